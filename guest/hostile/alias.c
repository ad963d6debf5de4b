// SPDX-License-Identifier: GPL-2.0
/* Another mapping of text, which another CPU moves to ordinary memory and back during stores through it. */
#include <linux/delay.h>
#include <linux/kthread.h>
#include <linux/mm.h>
#include <linux/vmalloc.h>
#include "hostile.h"

static pte_t *entry, ordinary, text;

static int switcher(void *unused)
{
	while (!kthread_should_stop()) {
		WRITE_ONCE(*entry, text);
		cpu_relax();
		WRITE_ONCE(*entry, ordinary);
		cond_resched();
	}
	return 0;
}

unsigned int attack_alias(void)
{
	unsigned int level, i, wrong = 0, offset = offset_in_page(target) + SLOT_ALIAS * SLOT;
	struct page *page = alloc_page(GFP_KERNEL);
	struct task_struct *task;
	struct open_text open;
	u8 *mapping = page ? vmap(&page, 1, VM_MAP, PAGE_KERNEL) : NULL;

	if (!mapping)
		goto out;
	entry = lookup_address((unsigned long)mapping, &level);
	ordinary = *entry;
	text = pfn_pte(__pa(target) >> PAGE_SHIFT, PAGE_KERNEL);
	task = kthread_run(switcher, NULL, "switcher");
	if (IS_ERR(task))
		goto unmap;
	for (i = 0; i < 2000; i++) {
		asm volatile("invlpg (%0); movb %1, (%0)" : : "r"(mapping + offset), "q"((u8)(NOP + i % 8)) : "memory");
		asm volatile("invlpg (%0); movq %1, (%0)" : : "r"(mapping + offset), "r"(0x9191919191919191) : "memory");
		if (i % 64 == 0)
			cond_resched();
	}
	kthread_stop(task);
unmap:
	WRITE_ONCE(*entry, ordinary);
	vunmap(mapping);
	open = open_text();
	fill(slot_at(SLOT_ALIAS), NOP, SLOT);
	wrong += differ(slot_at(SLOT_ALIAS), NOP, SLOT);
	close_text(open);
out:
	if (page)
		__free_page(page);
	return wrong;
}
