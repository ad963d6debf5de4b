//! Live patching of kernel text, as pure logic.
//!
//! ```text
//! plan ──resolve──▶ resolved plan ──compile──▶ program ──session──▶ steps
//!   ▲                  ▲        ▲                          ◀── outcomes
//!   JSON          kernel image  guest memory
//! ```
//!
//! # Rooms
//!
//! Each module is a room, and a room uses only rooms above it in this table. The test `house` of the
//! crate `tests` enforces that.
//!
//! | room | what is in it |
//! |---|---|
//! | [`addr`] | addresses and vCPU numbers as types |
//! | [`insn`] | decoding, relocating and emulating instructions |
//! | [`image`] | a kernel image: release, symbols, tables of patch sites, offsets |
//! | [`plan`] | a plan in JSON, and every reason to refuse one |
//! | [`object`](mod@object) | an object of the kernel's source, and whether it belongs to an image |
//! | [`linux`] | a running kernel: live addresses, modules, kprobes, livepatches |
//! | [`site`] | a range of text with the bytes before and after |
//! | [`safety`] | where vCPUs and tasks may be; blockers, traps, copies of instructions |
//! | [`resolve`] | from a plan to sites and words of data, or to refusals |
//! | [`program`] | from sites to steps; the session that yields and undoes them |
//!
//! # Invariants
//!
//! - No KVM, no clock, no thread, no file: the caller brings bytes and executes steps.
//! - No unsafe code.
//! - Guest memory is not trusted: every walk and every size is bounded, and no byte is written that
//!   was not compared with what the image or the plan expects.
//! - A [`program::session::Session`] calls nothing. It yields a [`program::step::Step`], takes the
//!   outcome and yields the next.
//! - Every program ends with all sites new, all sites old, or the guest held.
//!
//! # Example
//!
//! A static key is switched in a miniature kernel, whose memory is a `Vec<u8>`.
//!
//! ```
//! use patcher::addr::Gva;
//! use patcher::image::KernelImage;
//! use patcher::linux::{GuestMemory, Kernel, Modules};
//! use patcher::plan::Plan;
//! use patcher::program::compile::{Host, compile};
//! use patcher::program::session::End;
//! use patcher::program::step::{Step, StepError};
//! use patcher::program::target::{Target, drive};
//! use patcher::resolve::{RunningGuest, resolve};
//! use patcher::safety::slots::Arena;
//! # #[path = "../tests/properties/miniature.rs"] mod miniature;
//!
//! /// A guest of plain memory, mapped from `base` on, without vCPUs.
//! struct Guest {
//!     base: Gva,
//!     memory: Vec<u8>,
//! }
//!
//! impl Guest {
//!     fn range(&self, at: Gva, size: usize) -> Option<std::ops::Range<usize>> {
//!         let from = at.offset_from(self.base)?;
//!         (from + size <= self.memory.len()).then_some(from..from + size)
//!     }
//! }
//!
//! impl GuestMemory for Guest {
//!     fn read(&self, at: Gva, into: &mut [u8]) -> Result<(), Gva> {
//!         into.copy_from_slice(&self.memory[self.range(at, into.len()).ok_or(at)?]);
//!         Ok(())
//!     }
//! }
//!
//! impl Target for Guest {
//!     fn perform(&mut self, step: &Step) -> Result<(), StepError> {
//!         let (at, old, new) = match step {
//!             Step::Check { at, bytes } => (*at, Some(&bytes[..]), None),
//!             Step::Write { at, bytes } => (*at, None, Some(&bytes[..])),
//!             Step::Store { at, old, new } => (*at, Some(&old[..]), Some(&new[..])),
//!             Step::Open { at, byte } => (*at, None, Some(std::slice::from_ref(byte))),
//!             // Fences, holds and traps concern vCPUs.
//!             _ => return Ok(()),
//!         };
//!         let size = old.or(new).map_or(0, <[u8]>::len);
//!         let range = self.range(at, size).ok_or(StepError::Unmapped { at })?;
//!         let found = &mut self.memory[range];
//!         if old.is_some_and(|old| old != found) {
//!             return Err(StepError::Mismatch { found: found.to_vec() });
//!         }
//!         if let Some(new) = new {
//!             found.copy_from_slice(new);
//!         }
//!         Ok(())
//!     }
//!
//!     fn expired(&self) -> bool {
//!         false
//!     }
//! }
//!
//! # fn main() {
//! # let file = miniature::vmlinux();
//! // `file` holds the kernel image, `guest` the memory of the kernel that runs it.
//! let image = KernelImage::parse(&file).expect("a kernel");
//! # let mut guest = Guest { base: image.text_base(), memory: file[64 + 56..].to_vec() };
//! # let entry = image.tables().jump_entries.as_ref().unwrap()[0];
//! # let jump = guest.range(entry.code, 5).unwrap();
//! # guest.memory[jump].copy_from_slice(&patcher::insn::jmp_rel32(entry.code, entry.target).unwrap());
//! let kernel = Kernel { image: &image, slide: 0, modules: &Modules::NONE };
//!
//! let plan = br#"{ "version": 1, "name": "demo", "patches": [{ "static_key": "key", "enable": true }] }"#;
//! let plan = Plan::parse(plan).expect("well-formed");
//! let resolved = resolve(&plan, RunningGuest { kernel, text: &guest, vcpus: 2 }, []).expect("it fits");
//! assert_eq!((resolved.sites.len(), resolved.data.len()), (1, 1));
//!
//! let mut arena = Arena::new(Gva(0xffff_ffff_a000_0000), 4096);
//! let host = Host { stores_are_whole: false };
//! let program = compile(&resolved, host, &mut arena).expect("it can be applied and reverted");
//! assert_eq!(drive(&program, &mut guest), End::Applied);
//!
//! let site = &resolved.sites[0];
//! let mut now = vec![0; site.new.len()];
//! guest.read(site.at, &mut now).expect("mapped");
//! assert_eq!(now, site.new);
//!
//! // The reversed plan restores the old code.
//! let undo = compile(&resolved.reversed(), host, &mut arena).expect("it fits");
//! assert_eq!(drive(&undo, &mut guest), End::Applied);
//! guest.read(site.at, &mut now).expect("mapped");
//! assert_eq!(now, site.old);
//! # }
//! ```

#![forbid(unsafe_code)]

pub mod addr;
pub mod budget;
pub mod image;
pub mod insn;
pub mod linux;
pub mod object;
pub mod plan;
pub mod program;
pub mod resolve;
pub mod safety;
pub mod site;
