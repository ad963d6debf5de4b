//! Names in a running kernel: what a plan writes, and where that is.

use crate::addr::Gva;
use crate::image::symbols::Found;
use crate::image::tables::{CALL_KEY, CALL_TRAMPOLINE};
use crate::linux::modules::Module;
use crate::linux::view::Kernel;
use crate::plan::refusal::Refusal;

/// An address farther behind a module's last symbol is not the module's, in bytes.
const LARGEST_MODULE: usize = 16 << 20;
/// Most places of an ambiguous name that a refusal lists.
const MOST_FORMS: usize = 16;

impl<'a> Kernel<'a> {
    /// A live address as a plan writes it, if a symbol leads to it.
    #[must_use]
    pub fn identify(&self, at: Gva) -> Option<String> {
        let nearest = |module: &&'a Module| module.symbols.at_or_before(at);
        let module = self.modules.known().iter().max_by_key(nearest).filter(|module| {
            let distance = nearest(module).and_then(|symbol| at.offset_from(symbol));
            distance.is_some_and(|distance| distance < LARGEST_MODULE)
        });
        match module {
            Some(module) => module.symbols.identify(at).map(|name| format!("{}:{name}", module.name)),
            None => self.image.symbols().identify(self.linked(at)),
        }
    }

    /// The live address of a symbol. A module's symbol is written `module:symbol`; in the module's name,
    /// dashes and underscores are the same, as to `modprobe`. One of several symbols of a name is
    /// written `symbol,N` ([`Symbols::find`](crate::image::Symbols::find)).
    ///
    /// # Errors
    /// [`Refusal::UnknownSymbol`] or [`Refusal::AmbiguousSymbol`]; for a module's, as [`Modules::all`](crate::linux::Modules::all).
    pub fn symbol(&self, name: &str) -> Result<Gva, Refusal> {
        let unknown = || Refusal::UnknownSymbol { name: name.to_owned() };
        let (found, slide) = match name.split_once(':') {
            Some((module, symbol)) => {
                let module = self.module(module)?.ok_or_else(unknown)?;
                (module.symbols.find(symbol), 0)
            }
            None => (self.image.symbols().find(name), self.slide),
        };
        match found {
            Found::One(at) => Ok(Gva(at.0.wrapping_add(slide))),
            Found::None => Err(unknown()),
            Found::Several(at) => Err(self.ambiguous(name, &at)),
        }
    }

    /// A loaded module by its name.
    fn module(&self, name: &str) -> Result<Option<&'a Module>, Refusal> {
        let letter = |byte: u8| if byte == b'-' { b'_' } else { byte };
        let same = |module: &&Module| module.name.bytes().map(letter).eq(name.bytes().map(letter));
        Ok(self.modules.all()?.iter().find(same))
    }

    /// The refusal of a name that is at several places, with the forms that a plan can write instead.
    fn ambiguous(&self, name: &str, at: &[Gva]) -> Refusal {
        let form = |(place, at): (usize, &Gva)| {
            // Modules have no `_text`.
            let from_first = Some(*at).filter(|_| !name.contains(':'));
            let from_first = from_first.and_then(|at| self.image.symbols().from_first(at));
            let also = from_first.map_or_else(String::new, |form| format!(" ({form})"));
            format!("{name},{}{also}", place + 1)
        };
        let forms = at.iter().take(MOST_FORMS).enumerate().map(form).collect();
        Refusal::AmbiguousSymbol { name: name.to_owned(), forms, places: at.len() }
    }

    /// The live address that a plan writes as `symbol`, `symbol,N`, `symbol+0xoffset` or `0xaddress`.
    ///
    /// ```
    /// use patcher::addr::Gva;
    /// use patcher::image::{KernelImage, Symbols};
    /// use patcher::linux::{Kernel, Modules};
    ///
    /// let symbols = [(0x8100_0000, b'T', "_text"), (0x8100_0040, b'T', "do_syslog")];
    /// let symbols = Symbols::new(symbols.into_iter()).expect("few");
    /// let image = KernelImage::from_parts("6.1.0".into(), symbols, Gva(0x8100_0000));
    /// // KASLR has moved the kernel by 2 MiB.
    /// let kernel = Kernel { image: &image, slide: 0x20_0000, modules: &Modules::NONE };
    /// assert_eq!(kernel.address("do_syslog+0x14"), Ok(Gva(0x8120_0054)));
    /// assert_eq!(kernel.address("do_nothing").unwrap_err().code(), "unknown_symbol");
    /// ```
    ///
    /// # Errors
    /// As [`Kernel::symbol`], and [`Refusal::BadAddress`].
    pub fn address(&self, text: &str) -> Result<Gva, Refusal> {
        let bad = || Refusal::BadAddress { text: text.to_owned() };
        let number = |digits: &str| u64::from_str_radix(digits.strip_prefix("0x")?, 16).ok();
        if text.starts_with("0x") {
            return number(text).map(Gva).ok_or_else(bad);
        }
        let (name, offset) = match text.split_once('+') {
            Some((name, offset)) => (name, number(offset).ok_or_else(bad)?),
            None => (text, 0),
        };
        if name.is_empty() {
            return Err(bad());
        }
        let base = self.symbol(name)?;
        base.0.checked_add(offset).map(Gva).ok_or_else(bad)
    }

    /// The key and the trampoline of a static call, by its name in the kernel's source.
    ///
    /// # Errors
    /// As [`Kernel::symbol`].
    pub fn static_call(&self, name: &str) -> Result<(Gva, Option<Gva>), Refusal> {
        let unprefixed = |error| match error {
            Refusal::UnknownSymbol { .. } => Refusal::UnknownStaticCall { name: name.to_owned() },
            Refusal::AmbiguousSymbol { places, .. } => {
                let forms = (1..=places.min(MOST_FORMS)).map(|place| format!("{name},{place}")).collect();
                Refusal::AmbiguousSymbol { name: name.to_owned(), forms, places }
            }
            other => other,
        };
        let prefixed = |prefix: &str| match name.split_once(':') {
            Some((module, name)) => format!("{module}:{prefix}{name}"),
            None => format!("{prefix}{name}"),
        };
        let key = self.symbol(&prefixed(CALL_KEY)).map_err(unprefixed)?;
        match self.symbol(&prefixed(CALL_TRAMPOLINE)) {
            Ok(trampoline) => Ok((key, Some(trampoline))),
            Err(Refusal::UnknownSymbol { .. }) => Ok((key, None)),
            Err(ambiguous) => Err(unprefixed(ambiguous)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{KernelImage, Symbols};
    use crate::linux::modules::Modules;

    #[test]
    fn every_place_of_a_name_can_be_written() {
        const TEXT: u64 = 0xffff_ffff_8100_0000;
        const SLIDE: u64 = 0x20_0000;
        let of = |symbols: &[(u64, &'static str)]| {
            Symbols::new(symbols.iter().map(|(at, name)| (*at, b't', *name))).expect("a table")
        };
        let own = of(&[(TEXT, "_text"), (TEXT + 0x40, "dup"), (TEXT + 0x80, "dup"), (TEXT + 0xc0, "one")]);
        let image = KernelImage::from_parts("x".to_owned(), own, Gva(TEXT));
        let module = Module {
            at: Gva(0),
            name: "kvm_intel".to_owned(),
            text: Gva(0x1000)..Gva(0x2000),
            symbols: of(&[(0x1000, "init"), (0x1100, "exit"), (0x1200, "exit")]),
            jump_entries: Vec::new(),
            static_call_sites: Vec::new(),
            exceptions: Vec::new(),
            orc: None,
            landings: crate::image::landings::Landings::default(),
        };
        let modules = Modules::new(Ok((vec![module], Vec::new())));
        let kernel = Kernel { image: &image, slide: SLIDE, modules: &modules };
        let second = Gva(TEXT + SLIDE + 0x80);
        for text in ["dup,2", "_text+0x80", "dup,1+0x40", "one+0xffffffffffffffc0"] {
            let found = kernel.address(text);
            // An offset goes forward only.
            assert_eq!(found.ok(), Some(second).filter(|_| !text.starts_with("one")), "{text}");
        }
        assert_eq!(kernel.function_at(second).map(|function| function.name), Some("dup"));
        assert_eq!(kernel.identify(second).as_deref(), Some("dup,2"));
        for text in ["kvm-intel:exit,2", "kvm_intel:exit,2", "kvm-intel:init+0x200"] {
            assert_eq!(kernel.address(text), Ok(Gva(0x1200)), "{text}");
        }
        let refused = |text| kernel.address(text).expect_err("it is refused");
        assert_eq!(
            refused("dup").to_string(),
            "dup is ambiguous; write one of dup,1 (_text+0x40), dup,2 (_text+0x80)"
        );
        assert_eq!(
            refused("kvm-intel:exit").to_string(),
            "kvm-intel:exit is ambiguous; write one of kvm-intel:exit,1, kvm-intel:exit,2"
        );
        assert_eq!(refused("dup,3").code(), "unknown_symbol");
        assert_eq!(refused("kvm:exit,1").code(), "unknown_symbol");
    }
}
