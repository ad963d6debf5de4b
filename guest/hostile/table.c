// SPDX-License-Identifier: GPL-2.0
/* An interrupt table of our own (SDM volume 3, 6.14.1): #DB, #BP, #UD and #GP are counted, on the stack that is in use. */
#include <linux/string.h>
#include <asm/segment.h>
#include "hostile.h"

struct gate { u16 low, selector; u8 stack, kind; u16 middle; u32 high, none; };

static struct gate gates[256] __aligned(4096);
unsigned long seen_db, seen_bp, seen_ud, seen_gp, bp_return, fault_length = 2;

void hostile_db(void);
void hostile_bp(void);
void hostile_ud(void);
void hostile_gp(void);

/* #DB goes on stepping, #BP notes where it returns, faults go on behind their instruction. */
asm(".pushsection .text\n"
    "hostile_db: incq seen_db(%rip); iretq\n"
    "hostile_bp: incq seen_bp(%rip); push %rax; mov 8(%rsp), %rax; mov %rax, bp_return(%rip); pop %rax; iretq\n"
    "hostile_ud: incq seen_ud(%rip); push %rax; mov fault_length(%rip), %rax; add %rax, 8(%rsp); pop %rax; iretq\n"
    "hostile_gp: incq seen_gp(%rip); add $8, %rsp; push %rax; mov fault_length(%rip), %rax; add %rax, 8(%rsp);\n"
    "	pop %rax; iretq\n"
    ".popsection\n");

static void set_gate(unsigned int vector, void (*handler)(void))
{
	unsigned long at = (unsigned long)handler;

	gates[vector] = (struct gate){ at, __KERNEL_CS, 0, 0x8e, at >> 16, at >> 32, 0 };
}

/* With interrupts off, by one CPU at a time: parameters are written under one lock (kernel/params.c). */
struct own_table use_own_table(void)
{
	struct own_table own;
	struct { u16 limit; u64 base; } __packed ours = { sizeof(gates) - 1, (u64)gates };

	asm volatile("sidt %0" : "=m"(own.kernels));
	memcpy(gates, (void *)own.kernels.base, sizeof(gates));
	set_gate(1, hostile_db);
	set_gate(3, hostile_bp);
	set_gate(6, hostile_ud);
	set_gate(13, hostile_gp);
	seen_db = seen_bp = seen_ud = seen_gp = 0;
	fault_length = 2;
	asm volatile("lidt %0" : : "m"(ours));
	return own;
}

void use_kernels_table(struct own_table own)
{
	asm volatile("lidt %0" : : "m"(own.kernels));
}
