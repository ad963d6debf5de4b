//! ACPI tables of a hardware-reduced machine (ACPI 6.5, 4.1): the CPUs, the serial port, reset and
//! power-off.

use acpi_tables::Aml;
use acpi_tables::aml::{Device, EISAName, IO, Interrupt, Name, Package, Path, ResourceTemplate, Scope};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use patcher::addr::Gpa;

use crate::memory::layout::{
    ACPI_TABLES, COM1, COM1_IRQ, HIGH_MEMORY, IO_APIC, LOCAL_APIC, RESET, RSDP, SLEEP_CONTROL,
};
use crate::memory::{Error, GuestRam};

const OEM: [u8; 6] = *b"RSTVMM";
const TABLE: [u8; 8] = *b"LIVEPTCH";

/// `IAPC_BOOT_ARCH` (ACPI 6.5, table 5.10): no VGA, no CMOS clock. Its bit 1 (8042) stays clear: the
/// keyboard controller here only resets.
const NO_VGA_NO_CMOS: u16 = 1 << 2 | 1 << 5;

/// Writes the tables for `cpus` processors.
///
/// # Errors
/// When RAM is too small to hold them.
pub fn write(ram: &GuestRam, cpus: u8) -> Result<(), Error> {
    let mut next = ACPI_TABLES;
    let mut put = |table: &dyn Aml| {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let at = next;
        next += (bytes.len() as u64).next_multiple_of(16);
        debug_assert!(next <= HIGH_MEMORY, "ACPI tables end at {next:#x}, above {HIGH_MEMORY:#x}");
        ram.write(Gpa(at), &bytes).map(|()| at)
    };
    let dsdt = put(&dsdt())?;
    let fadt = put(&fadt(dsdt).finalize())?;
    let madt = put(&madt(cpus))?;
    let mut xsdt = XSDT::new(OEM, TABLE, 1);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = put(&xsdt)?;
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    ram.write(Gpa(RSDP), &rsdp)
}

fn port(address: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(address))
}

fn fadt(dsdt: u64) -> FADTBuilder {
    let mut fadt = FADTBuilder::new(OEM, TABLE, 1)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = NO_VGA_NO_CMOS.into();
    fadt.reset_reg = port(RESET);
    fadt.reset_value = 1;
    fadt.sleep_control_reg = port(SLEEP_CONTROL);
    fadt.sleep_status_reg = port(SLEEP_CONTROL + 1);
    fadt
}

fn madt(cpus: u8) -> MADT {
    let mut madt = MADT::new(OEM, TABLE, 1, LocalInterruptController::Address(LOCAL_APIC));
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(cpus, IO_APIC, 0));
    madt
}

/// The DSDT: COM1, because a hardware-reduced machine has no legacy interrupt for it, and `\_S5`,
/// without which Linux offers no power-off.
fn dsdt() -> Dsdt {
    let mut code = Vec::new();
    let ports = IO::new(COM1, COM1, 1, 8);
    // Consumer, edge-triggered, active high, exclusive.
    let interrupt = Interrupt::new(true, true, false, false, COM1_IRQ);
    let com1 = ResourceTemplate::new(vec![&ports, &interrupt]);
    let hid = Name::new(Path::new("_HID"), &EISAName::new("PNP0501"));
    let uid = Name::new(Path::new("_UID"), &0u8);
    let crs = Name::new(Path::new("_CRS"), &com1);
    let device = Device::new(Path::new("COM1"), vec![&hid, &uid, &crs]);
    Scope::new(Path::new("_SB_"), vec![&device]).to_aml_bytes(&mut code);
    Name::new(Path::new("_S5_"), &Package::new(vec![&5u8, &0u8])).to_aml_bytes(&mut code);

    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM, TABLE, 1);
    table.append_slice(&code);
    Dsdt(table)
}

struct Dsdt(Sdt);

impl Aml for Dsdt {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(self.0.as_slice());
    }
}
