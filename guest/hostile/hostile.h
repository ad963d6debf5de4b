/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Attacks from ring 0. Each has its own slot of 64 bytes in text of the kernel that nothing
 * executes, filled with no-operations, and leaves it so.
 */
#include <linux/types.h>

#define SLOT 64
#define NOP 0x90

/* Slots 0 to 3 are for ring 3 (guest/src/inside/hostile/stage.rs). */
enum slot { SLOT_STORES = 4, SLOT_STACK = 5, SLOT_ALIAS = 6 };

/* What an attack found: how often something was not as the processor does it. */
typedef unsigned int (*attack_fn)(void);

extern unsigned long target, ops_at, probes_at;

u8 *slot_at(enum slot slot);
/* Counts the bytes of a slot that are not `value`. */
unsigned int differ(const u8 *at, u8 value, unsigned int length);
void fill(u8 *at, u8 value, unsigned int length);

/* Interrupts off and CR0.WP clear, so that text can be written to. */
struct open_text { unsigned long flags, cr0; };
struct open_text open_text(void);
void close_text(struct open_text open);

/* An interrupt table of our own, with handlers that count #DB, #BP, #UD and #GP. */
struct own_table { struct { u16 limit; u64 base; } __packed kernels; };
extern unsigned long seen_db, seen_bp, seen_ud, seen_gp, bp_return, fault_length;
struct own_table use_own_table(void);
void use_kernels_table(struct own_table own);

unsigned int attack_stores(void);
unsigned int attack_stack(void);
unsigned int attack_shadows(void);
unsigned int attack_steps(void);
unsigned int attack_alias(void);
unsigned int attack_lists(void);
unsigned int attack_nested(void);
