// SPDX-License-Identifier: GPL-2.0
/* Breakpoints in the shadows of `mov ss` and `sti`, with TF, and behind prefixes (SDM volume 3, 6.8.3). */
#include "hostile.h"

#define EXPECT(code)							\
	do {								\
		seen_bp = 0;						\
		asm volatile("xor %%ecx, %%ecx; mov %%ss, %%ecx; lea 1f(%%rip), %0\n" code "\n" \
			     : "=&r"(behind) : : "rcx", "memory", "cc");	\
		wrong += seen_bp != 1 || bp_return != behind;		\
	} while (0)

unsigned int attack_shadows(void)
{
	unsigned long behind;
	unsigned int wrong = 0;
	struct open_text open = open_text();
	struct own_table own = use_own_table();

	EXPECT("int3; 1:");
	EXPECT("mov %%ecx, %%ss; int3; 1:");
	EXPECT(".byte 0xf3, 0xcc; 1:");
	EXPECT(".byte 0x66, 0x48, 0xcc; 1:");
	EXPECT(".byte 0xcd, 3; 1:");
	/* TF as well: #DB is delivered at the handler's first instruction, or not at all. */
	EXPECT("pushf; orl $0x100, (%%rsp); popf; mov %%ecx, %%ss; int3; 1: pushf; andl $~0x100, (%%rsp); popf");
	/* Interrupts are on for no instruction but the handler's, whose gate switches them off. */
	EXPECT("sti; int3; 1: cli");
	use_kernels_table(own);
	close_text(open);
	return wrong;
}
