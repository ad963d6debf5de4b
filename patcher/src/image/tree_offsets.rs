//! Offsets of what a kernel reads to tell of an address in a module's code what it is, from its BTF.

use crate::image::btf::Btf;

/// The tree of modules by the addresses of their code, and a module's node in it (Linux kernel/module/internal.h,
/// `struct mod_tree_root`; include/linux/module.h, `struct mod_tree_node`; include/linux/rbtree_latch.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TreeOffsets {
    /// Of the tree: the sequence, 4 bytes, and the root of either tree.
    pub sequence: u64,
    /// The roots.
    pub trees: [u64; 2],
    /// The lowest and the highest address of any module.
    pub lowest: u64,
    /// The highest.
    pub highest: u64,
    /// Of `struct module`: where its code begins.
    pub base: u64,
    /// How much of it there is, 4 bytes, in one or two places.
    pub sizes: [u64; 2],
    /// The `struct mod_tree_node` of its code.
    pub node: u64,
    /// Of that: the module, and the node in either tree.
    pub module: u64,
    /// The nodes. Each has the parent with the colour, the right and the left child (include/linux/rbtree_types.h).
    pub nodes: [u64; 2],
}

impl TreeOffsets {
    /// With the layout of an entry of the exception table that new code's objects have (arch/x86/include/asm/extable.h, since 5.16).
    pub(super) fn read(btf: &Btf<'_>) -> Option<Self> {
        /// A `struct rb_node`, and a `struct rb_root`, in bytes.
        const NODE: u64 = 24;
        const ROOT: u64 = 8;
        const KNOWN: [(&str, &str, u32); 6] = [
            ("rb_node", "__rb_parent_color", 0),
            ("rb_node", "rb_right", 8),
            ("rb_node", "rb_left", 16),
            ("exception_table_entry", "insn", 0),
            ("exception_table_entry", "fixup", 4),
            ("exception_table_entry", "data", 8),
        ];
        let of = |name, member| btf.offset(name, member).map(u64::from);
        let (root, latch) = (of("mod_tree_root", "root")?, of("latch_tree_root", "tree")?);
        let node = of("mod_tree_node", "node")? + of("latch_tree_node", "node")?;
        // Since 6.4 a module has a node for each kind of its memory; the first is that of the code.
        let (start, memory, sizes) = match of("module", "mem") {
            Some(start) => (start, "module_memory", [of("module_memory", "size")?; 2]),
            None => {
                let sizes = [of("module_layout", "size")?, of("module_layout", "text_size")?];
                (of("module", "core_layout")?, "module_layout", sizes)
            }
        };
        let is_known = KNOWN.into_iter().all(|(name, member, at)| btf.offset(name, member) == Some(at));
        Some(Self {
            sequence: root + of("latch_tree_root", "seq")?,
            trees: [root + latch, root + latch + ROOT],
            lowest: of("mod_tree_root", "addr_min")?,
            highest: of("mod_tree_root", "addr_max")?,
            base: start + of(memory, "base")?,
            sizes: sizes.map(|size| start + size),
            node: start + of(memory, "mtn")?,
            module: of("mod_tree_node", "mod")?,
            nodes: [node, node + NODE],
        })
        .filter(|_| is_known)
    }
}
