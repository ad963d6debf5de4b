//! Properties of what faces the guest and the operator's files, for any input; shared by the tests here and
//! by the fuzz targets in `vmm/fuzz`.

use std::cell::RefCell;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use patcher::addr::{Gpa, Gva};
use vmm::boot::kernel::{Entry, load};
use vmm::devices::console::Console;
use vmm::devices::irq_line::IrqLine;
use vmm::devices::ports::Ports;
use vmm::devices::power::{Power, PowerRequest};
use vmm::host::backlog::Backlog;
use vmm::memory::GuestRam;
use vmm::memory::layout::{COM1, I8042, RESET, SLEEP_CONTROL, ZERO_PAGE};
use vmm::memory::paging::{LargePages, Mapping, PageTables, pieces};

/// The input's numbers, and zeros behind its end.
struct Numbers<'a>(&'a [u8]);

impl Numbers<'_> {
    fn byte(&mut self) -> u8 {
        let Some((byte, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *byte
    }

    fn next(&mut self) -> u64 {
        u64::from_le_bytes([(); 8].map(|()| self.byte()))
    }
}

/// Pages of page tables, from address 0 on.
const TABLES: u64 = 16;
/// Bits of an entry that are flags; bits 12 to 51 are an address.
const ENTRY_FLAGS: u64 = 0xfff0_0000_0000_0fff;
/// Bit 62 of an entry, which processors ignore, says here that it may lead out of the tables.
const ANYWHERE: u64 = 1 << 62;

/// Whatever page tables hold, a walk ends where the SDM's (volume 3, 4.5.4) does, a range's pieces are the
/// range, and what is cached is what a walk finds.
pub(crate) fn paging(input: &[u8]) {
    let mut numbers = Numbers(input);
    let choice = numbers.byte();
    let levels = 4 + (choice & 1);
    let root = u64::from(choice >> 4) << 12;
    let addresses = [(); 4].map(|()| numbers.next());
    let entries: Vec<u64> = (0..TABLES * 512)
        .map(|_| {
            let entry = if numbers.0.is_empty() { 0 } else { numbers.next() };
            if entry & ANYWHERE == 0 { entry & ENTRY_FLAGS | entry & (TABLES - 1) << 12 } else { entry }
        })
        .collect();
    let load = |at: Gpa| entries.get(usize::try_from(at.0 / 8).ok()?).copied();
    let tables = PageTables { root: Gpa(root), levels };
    let cache = LargePages::default();
    for address in addresses.into_iter().chain(addresses.map(|address| address ^ 0x1000)) {
        let found = tables.translate(Gva(address), load);
        assert_eq!(found, walk(root, levels, address, load), "{address:#x}");
        let again = cache.translate(Gva(address), |at| tables.translate(at, load));
        assert_eq!(again, found, "{address:#x} by the cache");
        let length = usize::try_from(address % 20_000).expect("small");
        if let Ok(parts) = pieces(Gva(address), length, |at| tables.translate(at, load)) {
            assert_eq!(parts.iter().map(|(_, size)| size).sum::<usize>(), length);
            let mut done = 0;
            for (at, size) in parts {
                let place = tables.translate(Gva(address + done), load).map(|mapping| mapping.at);
                assert_eq!(place, Some(at));
                done += size as u64;
            }
        }
    }
}

/// The walk once more, after the figures of the SDM (volume 3, 4-8 to 4-11).
fn walk(root: u64, levels: u8, address: u64, load: impl Fn(Gpa) -> Option<u64>) -> Option<Mapping> {
    let unused = if levels == 5 { 7 } else { 16 };
    if (address << unused).cast_signed() >> unused != address.cast_signed() {
        return None;
    }
    let mut table = root;
    let shifts: &[u32] = if levels == 5 { &[48, 39, 30, 21, 12] } else { &[39, 30, 21, 12] };
    for shift in shifts {
        let entry = load(Gpa(table + (address >> shift) % 512 * 8))?;
        if entry % 2 == 0 {
            return None;
        }
        let frame = entry & 0x000f_ffff_ffff_f000;
        let is_page = match (shift, entry >> 7 & 1) {
            (12, _) | (21 | 30, 1) => true,
            (_, 1) => return None,
            _ => false,
        };
        if is_page {
            let size = 1_u64 << shift;
            let offset = address % size;
            return Some(Mapping { at: Gpa(frame / size * size + offset), left: size - offset, size });
        }
        table = frame;
    }
    None
}

/// The bytes that the console has put out.
#[derive(Clone, Default)]
struct Output(Arc<Mutex<Vec<u8>>>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("no panic").extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Machine {
    ports: Ports,
    output: Output,
    backlog: Backlog,
}

static MACHINE: LazyLock<Mutex<Machine>> = LazyLock::new(|| {
    let output = Output::default();
    let backlog = Backlog::start("output", output.clone(), |_| String::new()).expect("a thread");
    let line = || IrqLine::new().expect("an eventfd");
    let console = Console::new(line(), line(), backlog.clone());
    Mutex::new(Machine { ports: Ports::new(console, Power::new()), output, backlog })
});

/// Registers of a 16550 UART, behind COM1: data or the divisor's low byte, line control, modem control.
const DATA: u16 = 0;
const LINE: u16 = 3;
const MODEM: u16 = 4;
/// DLAB of line control; the loopback bit of modem control.
const DIVISOR: u8 = 0x80;
const LOOPBACK: u8 = 0x10;

/// Whatever is done to ports: what is sent by the UART comes out, and nothing else does; a port without a
/// device and an access of another width read as ones; and the machine is asked to end as it should be.
pub(crate) fn ports(input: &[u8]) {
    const PORTS: [u16; 8] = [COM1, I8042, RESET, SLEEP_CONTROL, COM1 + 8, 0x70, 0, 0xffff];
    let machine = MACHINE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let (ports, mut numbers) = (&machine.ports, Numbers(input));
    for (register, value) in [(LINE, 0), (MODEM, 0), (1, 0)] {
        assert_eq!(ports.write(COM1 + register, &[value]), None);
    }
    machine.output.0.lock().expect("no panic").clear();
    let (mut line, mut modem, mut sent) = (0, 0, Vec::new());
    while !numbers.0.is_empty() {
        let (choice, value) = (numbers.byte(), numbers.byte());
        let port = PORTS[usize::from(choice & 7)].wrapping_add(u16::from(choice >> 3 & 7));
        let width = [1, 1, 2, 4][usize::from(choice >> 6)];
        let is_uart = (COM1..COM1 + 8).contains(&port);
        if value & 1 == 0 && !is_uart || is_uart && numbers.byte() & 1 == 0 {
            let mut data = vec![value; width];
            ports.read(port, &mut data);
            let has_device = is_uart || (I8042..=I8042 + 4).contains(&port) || port == SLEEP_CONTROL + 1;
            if width != 1 || !has_device {
                assert!(data.iter().all(|byte| *byte == 0xff), "{port:#x}");
            }
            continue;
        }
        let asked = ports.write(port, &vec![value; width]);
        let expected = match port {
            _ if width != 1 => None,
            RESET => Some(PowerRequest::Reset),
            SLEEP_CONTROL if value & 0x20 != 0 => Some(PowerRequest::Off),
            port if port == I8042 + 4 && value == 0xfe => Some(PowerRequest::Reset),
            _ => None,
        };
        assert_eq!(asked, expected, "{value:#x} to {port:#x}");
        if !is_uart || width != 1 {
            continue;
        }
        match port - COM1 {
            DATA if line & DIVISOR == 0 && modem & LOOPBACK == 0 => sent.push(value),
            LINE => line = value,
            MODEM => modem = value,
            _ => {}
        }
    }
    machine.backlog.flush_within(Duration::from_secs(10));
    let output = machine.output.0.lock().expect("no panic");
    assert!(*output == sent, "{} bytes were sent, {} came out", sent.len(), output.len());
}

/// The guest's RAM, in bytes.
const RAM: u64 = 32 << 20;
/// `ramdisk_image` and `ramdisk_size` in the zero page (Linux Documentation/arch/x86/zero-page.rst).
const RAMDISK: [u64; 2] = [0x218, 0x21c];

thread_local! {
    static MEMORY: RefCell<Option<GuestRam>> = const { RefCell::new(None) };
}

/// Whatever file is given for a kernel is loaded or refused with a text. If it is loaded, its entry and its
/// initrd are in RAM, and the initrd is whole.
pub(crate) fn boot(input: &[u8]) {
    if let Err(text) = loaded(input) {
        assert!(!text.is_empty());
    }
}

/// The same; returns why it is not loaded.
pub(crate) fn loaded(input: &[u8]) -> Result<(), String> {
    MEMORY.with_borrow_mut(|memory| {
        let ram = memory.get_or_insert_with(|| GuestRam::new(RAM).expect("memory"));
        let mut numbers = Numbers(input);
        let initrd = vec![0xa5; usize::from(numbers.byte()) * 64];
        let initrd = Some(&initrd[..]).filter(|initrd| !initrd.is_empty());
        let entry = match load(ram, Path::new("kernel"), numbers.0, initrd, "console=ttyS0") {
            Err(error) => return Err(error.to_string()),
            Ok(Entry::Pvh(entry)) => {
                assert!(entry < RAM, "{entry:#x}");
                return Ok(());
            }
            Ok(Entry::Long(entry)) => entry,
        };
        assert!(entry < RAM, "{entry:#x}");
        let Some(initrd) = initrd else { return Ok(()) };
        let mut field = [0; 4];
        let [at, size] = RAMDISK.map(|offset| {
            ram.read(Gpa(ZERO_PAGE + offset), &mut field).expect("RAM");
            u64::from(u32::from_le_bytes(field))
        });
        assert_eq!(size, initrd.len() as u64);
        assert!(at + size <= RAM && at > entry, "the initrd is at {at:#x}");
        let mut there = vec![0; initrd.len()];
        ram.read(Gpa(at), &mut there).expect("RAM");
        assert!(there == initrd, "the initrd at {at:#x} is not whole");
        Ok(())
    })
}
