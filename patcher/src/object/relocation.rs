//! Relocations: where an address is written, and in which form.

use object::elf;

use crate::addr::Gva;

/// The forms of an address that a kernel's code and data have (System V ABI for AMD64, 4.4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `R_X86_64_64`: the address, 8 bytes.
    Absolute64,
    /// `R_X86_64_32`: the address, 4 bytes, of which the others are zero.
    Absolute32,
    /// `R_X86_64_32S`: the address, 4 bytes, of which the others are its sign.
    Signed32,
    /// `R_X86_64_PC32` and `R_X86_64_PLT32`, which are one in a kernel: the distance from the field, 4 bytes.
    Relative32,
    /// `R_X86_64_PC64`: the distance from the field, 8 bytes. Only tables have it.
    Relative64,
}

impl Form {
    /// The form by its number. `None` if it is not known.
    pub(super) fn new(kind: elf::RelocationType) -> Option<Self> {
        Some(match kind {
            elf::R_X86_64_64 => Self::Absolute64,
            elf::R_X86_64_32 => Self::Absolute32,
            elf::R_X86_64_32S => Self::Signed32,
            elf::R_X86_64_PC32 | elf::R_X86_64_PLT32 => Self::Relative32,
            elf::R_X86_64_PC64 => Self::Relative64,
            _ => return None,
        })
    }

    /// The field's length in bytes.
    #[must_use]
    pub fn length(self) -> usize {
        match self {
            Self::Absolute64 | Self::Relative64 => 8,
            Self::Absolute32 | Self::Signed32 | Self::Relative32 => 4,
        }
    }

    /// The address that a field at `at` says. `None` if its length is not the form's.
    #[must_use]
    pub fn read(self, field: &[u8], at: Gva) -> Option<u64> {
        let narrow = || field.try_into().map(i32::from_le_bytes).map(i64::from).map(i64::cast_unsigned).ok();
        let wide = || field.try_into().map(u64::from_le_bytes).ok();
        Some(match self {
            Self::Absolute64 => wide()?,
            Self::Absolute32 => field.try_into().map(u32::from_le_bytes).ok()?.into(),
            Self::Signed32 => narrow()?,
            Self::Relative32 => narrow()?.wrapping_add(at.0),
            Self::Relative64 => wide()?.wrapping_add(at.0),
        })
    }

    /// Writes the address `to` into a field at `at`. `None` if the field's length is not the form's, or it can't hold
    /// the address; it is unchanged then.
    #[must_use]
    pub(super) fn write(self, field: &mut [u8], at: Gva, to: u64) -> Option<()> {
        let distance = to.wrapping_sub(at.0).cast_signed();
        let narrow = |value: i64| i32::try_from(value).ok().map(i32::to_le_bytes);
        let bytes: &[u8] = match self {
            Self::Absolute64 => &to.to_le_bytes(),
            Self::Relative64 => &distance.to_le_bytes(),
            Self::Absolute32 => &u32::try_from(to).ok()?.to_le_bytes(),
            Self::Signed32 => &narrow(to.cast_signed())?,
            Self::Relative32 => &narrow(distance)?,
        };
        (field.len() == bytes.len()).then(|| field.copy_from_slice(bytes))
    }
}

/// A relocation: a field that gets the address of a symbol, plus the addend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Relocation {
    /// Where the field is in its section.
    pub offset: usize,
    /// How the address is written.
    pub form: Form,
    /// The symbol, as its index in the object's list.
    pub symbol: usize,
    /// What is added to the symbol's address.
    pub addend: i64,
}

impl Relocation {
    /// Where the field ends.
    #[must_use]
    pub fn end(&self) -> usize {
        self.offset + self.form.length()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMS: [Form; 5] =
        [Form::Absolute64, Form::Absolute32, Form::Signed32, Form::Relative32, Form::Relative64];

    #[test]
    fn what_is_written_is_read_again_and_what_does_not_fit_is_not_written() {
        let at = Gva(0xffff_ffff_fee0_0000);
        for form in FORMS {
            for to in [0, 0x1f_bc00, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff_8100_0000, at.0, 1 << 40] {
                let mut field = vec![0xaa; form.length()];
                match form.write(&mut field, at, to) {
                    Some(()) => assert_eq!(form.read(&field, at), Some(to), "{form:?} {to:#x}"),
                    None => assert!(field.iter().all(|byte| *byte == 0xaa), "{form:?} {to:#x}"),
                }
            }
        }
        let fits = |form: Form, to: u64| form.write(&mut vec![0; form.length()], at, to).is_some();
        assert!(fits(Form::Absolute32, 0xffff_ffff) && !fits(Form::Absolute32, 0xffff_ffff_8100_0000));
        assert!(fits(Form::Signed32, 0xffff_ffff_8000_0000) && !fits(Form::Signed32, 0x8000_0000));
        assert!(fits(Form::Relative32, 0xffff_ffff_8100_0000) && fits(Form::Relative32, 0x1f_bc00));
        assert!(!fits(Form::Relative32, 0xffff_ffff_7000_0000));
    }
}
