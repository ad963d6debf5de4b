//! What [`sync`](crate::sync) needs of a vCPU's thread and of the host, by KVM and by Linux.

use std::any::Any;
use std::io;
use std::sync::Arc;

use crate::host::membarrier::Membarrier;
use crate::kvm::kick::Kick;
use crate::sync::protocol::{Barrier, VcpuThread};

impl VcpuThread for Kick {
    fn set_immediate_exit(&self) {
        self.set();
    }

    fn clear_immediate_exit(&self) {
        self.clear();
    }

    fn signal(&self) {
        Kick::signal(self);
    }

    fn hurry(self: Arc<Self>) -> Option<Box<dyn Any>> {
        let hurried = Kick::hurry(&self)?;
        Some(Box::new(hurried))
    }
}

impl Barrier for Membarrier {
    fn sync_core(&self) -> io::Result<()> {
        Membarrier::sync_core(*self)
    }
}
