// SPDX-License-Identifier: GPL-2.0
/* Tells which function its init called: 1, 2, or an error with which loading fails. */
#include <linux/module.h>

static int value;
module_param(value, int, 0444);

static __attribute__((noipa)) long probe_old(void)
{
	return 1;
}

static __used __attribute__((noipa)) long probe_new(void)
{
	return 2;
}

static __used __attribute__((noipa)) long probe_fails(void)
{
	return -EINVAL;
}

static int __init pending_probe_init(void)
{
	value = probe_old();
	return value < 0 ? value : 0;
}

static void __exit pending_probe_exit(void)
{
}

module_init(pending_probe_init);
module_exit(pending_probe_exit);
MODULE_LICENSE("GPL");
