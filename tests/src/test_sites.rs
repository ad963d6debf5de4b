//! Sites for tests: code that a system call is led to, with sites of every length from 1 to 15, of
//! every kind of control transfer, with RIP-relative operands, and across both kinds of boundaries.
//! With all sites old it returns 0; with any one site new it returns 1.

use crate::test_function::BEGIN;

/// A site.
#[derive(Debug, Clone)]
pub struct TestSite {
    /// What is special about it.
    pub name: String,
    /// Where it is, from the function's start.
    pub offset: usize,
    /// Its old code.
    pub old: Vec<u8>,
    /// Its new code.
    pub new: Vec<u8>,
}

/// The code and its sites.
#[derive(Debug, Default)]
pub struct TestSites {
    /// What the function is from [`BEGIN`] on.
    pub code: Vec<u8>,
    /// The sites.
    pub sites: Vec<TestSite>,
}

/// `inc eax`.
const INC: [u8; 2] = [0xff, 0xc0];
const RET: u8 = 0xc3;
const NOP: u8 = 0x90;

impl TestSites {
    /// Lays the code out for a function that begins at `start`.
    ///
    /// # Errors
    /// When it has more than `room` bytes.
    pub fn new(start: u64, room: usize) -> Result<Self, String> {
        let mut all = Self::default();
        // The table comes first, so that its place is known: two constants and a function.
        all.code.extend([0xeb, 0]);
        let zero = all.fixed(&[0, 0, 0, 0]);
        let one = all.fixed(&[1, 0, 0, 0]);
        let counts = all.fixed(&[INC[0], INC[1], RET]);
        all.code[1] = u8::try_from(all.code.len() - 2).map_err(|e| e.to_string())?;

        // mov eax, [rip+zero] / [rip+one]: it sets the result, so it comes first.
        let load = |at: usize, from: usize| [vec![0x8b, 0x05], relative(at + 6, from)].concat();
        let at = all.here();
        all.site("RIP-relative", load(at, zero), load(at, one));
        all.straddle(start, 4096, "straddles a page");
        all.straddle(start, 64, "straddles a cache line");
        // clc / stc, then adc eax, 0.
        all.site("length 1", vec![0xf8], vec![0xf9]);
        all.fixed(&[0x83, 0xd0, 0]);
        for length in 2..=15 {
            all.site(&format!("length {length}"), nop(length), add(length));
        }
        // Not a call before: tasks return behind calls, so the code could not be put there.
        let call = [vec![0xe8], relative(all.here() + 5, counts)].concat();
        all.site("call", nop(5), call);
        // jmp over the inc, or not over it, in five bytes each.
        all.site("jmp", vec![0xe9, 2, 0, 0, 0], vec![0xe9, 0, 0, 0, 0]);
        all.fixed(&INC);
        // cmp eax, eax; jnz or jz to an inc that leads back.
        all.fixed(&[0x39, 0xc0]);
        all.site("jcc", vec![0x74, 2], vec![0x75, 2]);
        all.fixed(&INC);
        all.site("ret", vec![RET], vec![NOP]);
        all.fixed(&INC);
        all.fixed(&[RET]);
        if all.code.len() > room {
            return Err(format!("the code has {} bytes, the function only {room}", all.code.len()));
        }
        all.code.resize(room, NOP);
        Ok(all)
    }

    fn here(&self) -> usize {
        BEGIN + self.code.len()
    }

    fn fixed(&mut self, code: &[u8]) -> usize {
        let at = self.here();
        self.code.extend(code);
        at
    }

    fn site(&mut self, name: &str, old: Vec<u8>, new: Vec<u8>) {
        let offset = self.fixed(&old);
        self.sites.push(TestSite { name: name.to_owned(), offset, old, new });
    }

    /// A site of five bytes, two of them before the next multiple of `boundary`.
    fn straddle(&mut self, start: u64, boundary: u64, name: &str) {
        const JMP: usize = 5;
        let behind = self.here() + JMP;
        let mut gap = 0;
        while !(start + (behind + gap) as u64 + 2).is_multiple_of(boundary) {
            gap += 1;
        }
        self.fixed(&[vec![0xe9], relative(behind, behind + gap), vec![NOP; gap]].concat());
        self.site(name, nop(5), add(5));
    }
}

fn relative(next: usize, to: usize) -> Vec<u8> {
    let distance = i64::try_from(to).unwrap_or(0) - i64::try_from(next).unwrap_or(0);
    i32::try_from(distance).unwrap_or(0).to_le_bytes().to_vec()
}

/// One no-operation of so many bytes, 2 to 15: operand-size prefixes make it longer.
fn nop(length: usize) -> Vec<u8> {
    const LONGEST: usize = 8;
    let plain = patcher::insn::nops(length.min(LONGEST));
    [vec![0x66; length.saturating_sub(LONGEST)], plain].concat()
}

/// One instruction of so many bytes, 2 to 15, that adds 1 to the result: prefixes that do
/// nothing make it longer.
fn add(length: usize) -> Vec<u8> {
    match length {
        2 => INC.to_vec(),
        3 => vec![0x83, 0xc0, 1],
        4 => vec![0x48, 0x83, 0xc0, 1],
        5 => vec![0x05, 1, 0, 0, 0],
        6 => vec![0x48, 0x05, 1, 0, 0, 0],
        _ => [vec![0x2e; length - 7], vec![0x48, 0x81, 0xc0, 1, 0, 0, 0]].concat(),
    }
}

#[cfg(test)]
mod tests {
    use patcher::addr::Gva;
    use patcher::insn;

    use super::*;

    #[test]
    fn every_site_is_one_instruction_before_and_after() {
        let all = TestSites::new(0xffff_ffff_8152_ff50, 1771).expect("it fits");
        for site in &all.sites {
            assert_eq!(site.old.len(), site.new.len(), "{}", site.name);
            for code in [&site.old, &site.new] {
                assert_eq!(insn::count(code, Gva(0)), Some(1), "{}: {}", site.name, insn::hex(code));
            }
            let from = site.offset - BEGIN;
            assert_eq!(all.code[from..from + site.old.len()], site.old, "{}", site.name);
        }
        let names: std::collections::BTreeSet<_> = all.sites.iter().map(|s| &s.name).collect();
        assert_eq!(names.len(), all.sites.len());
        for length in 1..=15 {
            assert!(all.sites.iter().any(|s| s.old.len() == length), "{length}");
        }
    }
}
