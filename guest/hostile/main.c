// SPDX-License-Identifier: GPL-2.0
/*
 * A kernel that is the enemy: attacks by name, through the parameter `attack`, and a device
 * by which user space maps the page of the kernel's text that `target` lies in.
 */
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include "hostile.h"

/* Not called as what they point to: symbols of that name are looked up. */
unsigned long target, ops_at, probes_at;
module_param(target, ulong, 0644);
module_param_named(klp_ops, ops_at, ulong, 0644);
module_param_named(kprobe_table, probes_at, ulong, 0644);

static const struct { const char *name; attack_fn run; } attacks[] = {
	{ "stores", attack_stores }, { "stack", attack_stack }, { "shadows", attack_shadows },
	{ "steps", attack_steps }, { "alias", attack_alias }, { "lists", attack_lists },
	{ "nested", attack_nested },
};

u8 *slot_at(enum slot slot)
{
	return (u8 *)(target + slot * SLOT);
}

unsigned int differ(const u8 *at, u8 value, unsigned int length)
{
	unsigned int i, found = 0;

	for (i = 0; i < length; i++)
		found += READ_ONCE(at[i]) != value;
	return found;
}

/* By single moves, which the text guard knows. */
void fill(u8 *at, u8 value, unsigned int length)
{
	unsigned int i;

	for (i = 0; i < length; i++)
		WRITE_ONCE(at[i], value);
}

/* `write_cr0` keeps WP set (arch/x86/kernel/cpu/common.c, `native_write_cr0`). */
static void set_cr0(unsigned long value)
{
	asm volatile("mov %0, %%cr0" : : "r"(value) : "memory");
}

struct open_text open_text(void)
{
	struct open_text open;

	local_irq_save(open.flags);
	asm volatile("mov %%cr0, %0" : "=r"(open.cr0));
	set_cr0(open.cr0 & ~(1UL << 16));
	return open;
}

void close_text(struct open_text open)
{
	set_cr0(open.cr0);
	local_irq_restore(open.flags);
}

/* Writing an attack's name does it. The write fails with EBADE if the processor behaved wrongly. */
static int attack_set(const char *text, const struct kernel_param *param)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(attacks); i++)
		if (sysfs_streq(text, attacks[i].name))
			return !target ? -EINVAL : attacks[i].run() ? -EBADE : 0;
	return -ENOENT;
}

static const struct kernel_param_ops attack_ops = { .set = attack_set };
module_param_cb(attack, &attack_ops, NULL, 0200);

static int hostile_mmap(struct file *file, struct vm_area_struct *area)
{
	if (!target || area->vm_end - area->vm_start != PAGE_SIZE)
		return -EINVAL;
	return remap_pfn_range(area, area->vm_start, __pa(target) >> PAGE_SHIFT, PAGE_SIZE, area->vm_page_prot);
}

static const struct file_operations device_ops = { .owner = THIS_MODULE, .mmap = hostile_mmap };
static struct miscdevice device = { .minor = MISC_DYNAMIC_MINOR, .name = "hostile", .fops = &device_ops };

module_misc_device(device);
MODULE_LICENSE("GPL");
