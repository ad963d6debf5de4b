// SPDX-License-Identifier: GPL-2.0
/* Stores to text that a monitor may not know: vectors, exchanges, locked ones, none at all. */
#include <asm/fpu/api.h>
#include <asm/cpufeature.h>
#include "hostile.h"

#define FORM(code, length, ...)					\
	do {							\
		asm volatile(code : : __VA_ARGS__ : "memory");	\
		wrong += differ(at, 0x91, length);		\
		wrong += differ(at + (length), NOP, SLOT - (length)); \
		fill(at, NOP, SLOT);				\
	} while (0)

unsigned int attack_stores(void)
{
	u8 *at = slot_at(SLOT_STORES);
	u64 value = 0x9191919191919191, exchanged = value;
	u8 vector[32] __aligned(32);
	unsigned int wrong = 0;
	unsigned long count = 0;
	struct open_text open;
	void *to = at;

	fill(vector, 0x91, 32);
	kernel_fpu_begin();
	open = open_text();
	FORM("mov %1, (%0)", 8, "r"(at), "r"(value));
	asm volatile("xchg %0, (%1)" : "+r"(exchanged) : "r"(at) : "memory");
	wrong += differ(at, 0x91, 8) + (exchanged != 0x9090909090909090);
	fill(at, NOP, SLOT);
	FORM("lock cmpxchg %1, (%0)", 8, "r"(at), "r"(value), "a"(0x9090909090909090));
	FORM("lock addl $0x01010101, (%0)", 4, "r"(at));
	FORM("movnti %1, (%0)", 8, "r"(at), "r"(value));
	FORM("movdqu (%1), %%xmm0; movdqu %%xmm0, (%0)", 16, "r"(at), "r"(vector));
	if (boot_cpu_has(X86_FEATURE_AVX))
		FORM("vmovdqu (%1), %%ymm0; vmovdqu %%ymm0, (%0); vzeroupper", 32, "r"(at), "r"(vector));
	asm volatile("movsq" : "+D"(to) : "S"(vector) : "memory");
	wrong += differ(at, 0x91, 8) + (to != at + 8);
	fill(at, NOP, SLOT);
	to = at;
	/* Nothing is written. */
	asm volatile("rep stosb" : "+c"(count), "+D"(to) : "a"(0x91) : "memory");
	wrong += count != 0 || to != at || differ(at, NOP, SLOT);
	close_text(open);
	kernel_fpu_end();
	return wrong;
}
