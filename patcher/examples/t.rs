//! t
fn main(){ let t=std::time::Instant::now(); let b=std::fs::read(std::env::args().nth(1).unwrap()).unwrap(); let k=patcher::kernel::KernelImage::parse(&b).unwrap(); println!("{} {:?} n={} {:?}", k.release(), k.text_base(), k.symbols().len(), t.elapsed());
for s in ["_text","entry_SYSCALL_64","init_top_pgt","__alt_instructions","__alt_instructions_end","__initcall_start","__initcall_end","system_state","__x64_sys_getppid","__x64_sys_getpid","linux_banner","__init_begin","__init_end","asm_exc_int3"] { println!("{s} {:?}", k.symbols().find(s)); } }
