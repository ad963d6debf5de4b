//! Reading guest memory through the guest kernel's own page tables.

use crate::addr::Gva;
use crate::plan::refusal::Refusal;

/// The guest's memory, read through its kernel's own page tables.
pub trait GuestMemory {
    /// Fills `into` with the bytes at `at`.
    ///
    /// # Errors
    /// The first address that is not mapped; `into` may be partly filled.
    fn read(&self, at: Gva, into: &mut [u8]) -> Result<(), Gva>;

    /// Whether nothing more is read because too much was ([`Bounded`](crate::linux::Bounded)).
    fn is_exhausted(&self) -> bool {
        false
    }
}

/// Why nothing is read at an address.
fn unread(text: &dyn GuestMemory, at: Gva) -> Refusal {
    if text.is_exhausted() { Refusal::TooMuchToRead } else { Refusal::Unmapped { at } }
}

/// Reads `size` bytes.
///
/// # Errors
/// [`Refusal::Unmapped`], [`Refusal::TooMuchToRead`].
pub fn read(text: &dyn GuestMemory, at: Gva, size: usize) -> Result<Vec<u8>, Refusal> {
    let mut bytes = vec![0; size];
    text.read(at, &mut bytes).map_err(|at| unread(text, at))?;
    Ok(bytes)
}

/// Reads as many words of eight bytes as `size` bytes have.
///
/// # Errors
/// [`Refusal::Unmapped`], [`Refusal::TooMuchToRead`].
pub fn read_words(text: &dyn GuestMemory, at: Gva, size: usize) -> Result<Vec<u64>, Refusal> {
    let bytes = read(text, at, size)?;
    Ok(bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect())
}

/// Reads a word of eight bytes.
///
/// # Errors
/// [`Refusal::Unmapped`], [`Refusal::TooMuchToRead`].
pub fn read_u64(text: &dyn GuestMemory, at: Gva) -> Result<u64, Refusal> {
    let mut bytes = [0; 8];
    text.read(at, &mut bytes).map_err(|at| unread(text, at))?;
    Ok(u64::from_le_bytes(bytes))
}

/// Reads a word of four bytes.
///
/// # Errors
/// [`Refusal::Unmapped`], [`Refusal::TooMuchToRead`].
pub fn read_u32(text: &dyn GuestMemory, at: Gva) -> Result<u32, Refusal> {
    let mut bytes = [0; 4];
    text.read(at, &mut bytes).map_err(|at| unread(text, at))?;
    Ok(u32::from_le_bytes(bytes))
}
