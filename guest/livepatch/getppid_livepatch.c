// SPDX-License-Identifier: GPL-2.0
/* A livepatch of the guest's own: getppid returns what getpid does. */
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/sched.h>

static asmlinkage long getpid_instead(const struct pt_regs *regs)
{
	return task_tgid_vnr(current);
}

static struct klp_func functions[] = {
	{ .old_name = "__x64_sys_getppid", .new_func = getpid_instead },
	{ }
};

/* An object without a name is the kernel itself. */
static struct klp_object objects[] = {
	{ .funcs = functions },
	{ }
};

static struct klp_patch patch = { .mod = THIS_MODULE, .objs = objects };

static int __init getppid_livepatch_init(void)
{
	return klp_enable_patch(&patch);
}

/* Without it the module could not be unloaded. */
static void __exit getppid_livepatch_exit(void)
{
}

module_init(getppid_livepatch_init);
module_exit(getppid_livepatch_exit);
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
