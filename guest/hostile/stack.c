// SPDX-License-Identifier: GPL-2.0
/* The stack lies in text: pushes, calls, and the frames that the processor itself writes. */
#include "hostile.h"

unsigned int attack_stack(void)
{
	u8 *at = slot_at(SLOT_STACK);
	unsigned int wrong;
	u64 popped = 0;
	struct open_text open = open_text();
	struct own_table own = use_own_table();

	asm volatile("mov %%rsp, %%rbx\n"
		     "mov %1, %%rsp\n"
		     "push %2\n"
		     "call 1f\n"
		     "1: add $8, %%rsp\n"
		     "pop %0\n"
		     "ud2\n"
		     "int3\n"
		     "mov %%rbx, %%rsp\n"
		     : "=&r"(popped) : "r"(at + SLOT), "r"(0x9191919191919191) : "rbx", "memory", "cc");
	wrong = (popped != 0x9191919191919191) + (seen_ud != 1) + (seen_bp != 1);
	fill(at, NOP, SLOT);
	use_kernels_table(own);
	close_text(open);
	return wrong;
}
