//! A test bed of sites: a function that nobody uses is replaced, by a plan, with code made
//! for the purpose, and a hammered system call is led to it. Its sites cover every length
//! from 1 to 15, every kind of control transfer, RIP-relative operands, and both kinds of
//! boundaries that a site can straddle. With all sites old it returns 0; with any one site
//! new it returns 1.

/// The function that is replaced: long, calls nothing, and is used by nothing in the guest.
pub const FUNCTION: &str = "md5_transform";
/// Its first instruction is the tracer's no-operation, which stays.
pub const BEGIN: usize = 5;

/// A site of the bed.
#[derive(Debug, Clone)]
pub struct Station {
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
pub struct Bed {
    /// What the function is from [`BEGIN`] on.
    pub code: Vec<u8>,
    /// The sites.
    pub stations: Vec<Station>,
}

/// `inc eax`.
const INC: [u8; 2] = [0xff, 0xc0];
const RET: u8 = 0xc3;
const NOP: u8 = 0x90;

impl Bed {
    /// Lays the bed out for a function that begins at `start`.
    ///
    /// # Errors
    /// When it has more than `room` bytes.
    pub fn new(start: u64, room: usize) -> Result<Self, String> {
        let mut bed = Self::default();
        // The table comes first, so that its place is known: two constants and a function.
        bed.code.extend([0xeb, 0]);
        let zero = bed.fixed(&[0, 0, 0, 0]);
        let one = bed.fixed(&[1, 0, 0, 0]);
        let counts = bed.fixed(&[INC[0], INC[1], RET]);
        bed.code[1] = u8::try_from(bed.code.len() - 2).map_err(|e| e.to_string())?;

        // mov eax, [rip+zero] / [rip+one]: it sets the result, so it comes first.
        let load = |at: usize, from: usize| [vec![0x8b, 0x05], relative(at + 6, from)].concat();
        let at = bed.here();
        bed.station("RIP-relative", load(at, zero), load(at, one));
        bed.straddle(start, 4096, "straddles a page");
        bed.straddle(start, 64, "straddles a cache line");
        // clc / stc, then adc eax, 0.
        bed.station("length 1", vec![0xf8], vec![0xf9]);
        bed.fixed(&[0x83, 0xd0, 0]);
        for length in 2..=15 {
            bed.station(&format!("length {length}"), nop(length), add(length));
        }
        // Not a call before: the bed could not be put there, as tasks return behind calls.
        let call = [vec![0xe8], relative(bed.here() + 5, counts)].concat();
        bed.station("call", nop(5), call);
        // jmp over the inc, or not over it, in five bytes each.
        bed.station("jmp", vec![0xe9, 2, 0, 0, 0], vec![0xe9, 0, 0, 0, 0]);
        bed.fixed(&INC);
        // cmp eax, eax; jnz or jz to an inc that leads back.
        bed.fixed(&[0x39, 0xc0]);
        bed.station("jcc", vec![0x74, 2], vec![0x75, 2]);
        bed.fixed(&INC);
        bed.station("ret", vec![RET], vec![NOP]);
        bed.fixed(&INC);
        bed.fixed(&[RET]);
        if bed.code.len() > room {
            return Err(format!("the bed has {} bytes, the function only {room}", bed.code.len()));
        }
        bed.code.resize(room, NOP);
        Ok(bed)
    }

    fn here(&self) -> usize {
        BEGIN + self.code.len()
    }

    fn fixed(&mut self, code: &[u8]) -> usize {
        let at = self.here();
        self.code.extend(code);
        at
    }

    fn station(&mut self, name: &str, old: Vec<u8>, new: Vec<u8>) {
        let offset = self.fixed(&old);
        self.stations.push(Station { name: name.to_owned(), offset, old, new });
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
        self.station(name, nop(5), add(5));
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
        let bed = Bed::new(0xffff_ffff_8152_ff50, 1771).expect("it fits");
        for station in &bed.stations {
            assert_eq!(station.old.len(), station.new.len(), "{}", station.name);
            for code in [&station.old, &station.new] {
                assert_eq!(insn::count(code, Gva(0)), Some(1), "{}: {}", station.name, insn::hex(code));
            }
            let from = station.offset - BEGIN;
            assert_eq!(bed.code[from..from + station.old.len()], station.old, "{}", station.name);
        }
        let names: std::collections::BTreeSet<_> = bed.stations.iter().map(|s| &s.name).collect();
        assert_eq!(names.len(), bed.stations.len());
        for length in 1..=15 {
            assert!(bed.stations.iter().any(|s| s.old.len() == length), "{length}");
        }
    }
}
