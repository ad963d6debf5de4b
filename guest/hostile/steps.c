// SPDX-License-Identifier: GPL-2.0
/* Single steps over stores to text: a #DB behind each instruction (SDM volume 3, 17.3.1.4), whoever does it. */
#include "hostile.h"

static unsigned long steps_over(u8 *at)
{
	seen_db = 0;
	asm volatile("pushf; pushf; orl $0x100, (%%rsp); popf\n"
		     "movb $0x91, (%0)\n"
		     "movq %1, (%0)\n"
		     "movb $0x91, (%0)\n"
		     "popf\n"
		     : : "r"(at), "r"(0x9191919191919191) : "memory", "cc");
	return seen_db;
}

unsigned int attack_steps(void)
{
	u8 *at = slot_at(SLOT_STORES), data[8];
	struct open_text open = open_text();
	struct own_table own = use_own_table();
	unsigned int wrong = steps_over(at) != steps_over(data);

	wrong += differ(at, 0x91, 8);
	fill(at, NOP, SLOT);
	use_kernels_table(own);
	close_text(open);
	return wrong;
}
