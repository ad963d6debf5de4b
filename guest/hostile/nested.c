// SPDX-License-Identifier: GPL-2.0
/* Virtualization inside is not offered: switching it on fails, and so do its instructions (APM volume 2, 15.4; SDM volume 3, 24.7). */
#include <asm/msr.h>
#include <asm/tlbflush.h>
#include "hostile.h"

#ifndef EFER_SVME
#define EFER_SVME (1 << 12)
#endif

unsigned int attack_nested(void)
{
	unsigned int wrong = 0;
	unsigned long cr4;
	u64 efer, region = 0;
	struct open_text open = open_text();
	struct own_table own = use_own_table();

	fault_length = 3;
	asm volatile("mov %%cr4, %0" : "=r"(cr4));
	/* CR4.VMXE; then vmrun, vmload, vmsave, vmxoff. */
	asm volatile(".byte 0x0f, 0x22, 0xe0" : : "a"(cr4 | 1 << 13) : "memory");
	wrong += seen_gp != 1;
	asm volatile(".byte 0x0f, 0x01, 0xd8, 0x0f, 0x01, 0xda, 0x0f, 0x01, 0xdb, 0x0f, 0x01, 0xc4"
		     : : "a"(0) : "memory");
	wrong += seen_ud != 4;
	/* vmxon [rax] */
	fault_length = 4;
	asm volatile(".byte 0xf3, 0x0f, 0xc7, 0x30" : : "a"(&region) : "memory", "cc");
	wrong += seen_ud != 5;
	asm volatile("mov %0, %%cr4" : : "r"(cr4) : "memory");
	use_kernels_table(own);
	close_text(open);

	rdmsrl(MSR_EFER, efer);
	if (!wrmsrl_safe(MSR_EFER, efer | EFER_SVME)) {
		wrmsrl(MSR_EFER, efer);
		wrong++;
	}
	return wrong;
}
