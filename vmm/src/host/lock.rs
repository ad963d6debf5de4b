//! A mutex and a condition variable on those of the standard library, without poison: for locks at which
//! vCPUs sleep.
//!
//! The standard library's `notify_all` wakes every waiter at once (futex(2), `FUTEX_WAKE`), and a thread
//! that is running may take the mutex before one that was woken. parking_lot's wakes one waiter and hands
//! the mutex from each to the next: the last vCPU would go on only after the host had scheduled all others
//! in turn, and the controller would wait for vCPUs that the host has preempted.

use std::ops::{Deref, DerefMut};
use std::sync::PoisonError;
use std::time::Duration;

/// A mutex. A thread that panicked while it held the lock does not keep others out.
#[derive(Debug, Default)]
pub struct Mutex<T>(std::sync::Mutex<T>);

/// Holds a [`Mutex`].
#[derive(Debug)]
pub struct MutexGuard<'m, T>(
    // `None` only within `Condvar::wait`.
    Option<std::sync::MutexGuard<'m, T>>,
);

/// A condition variable.
#[derive(Debug, Default)]
pub struct Condvar(std::sync::Condvar);

impl<T> Mutex<T> {
    /// An unlocked mutex.
    pub const fn new(value: T) -> Self {
        Self(std::sync::Mutex::new(value))
    }

    /// Waits for the lock.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        MutexGuard(Some(self.0.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

impl Condvar {
    /// A condition variable that nothing waits for.
    #[must_use]
    pub const fn new() -> Self {
        Self(std::sync::Condvar::new())
    }

    /// Gives the lock back, waits to be woken, and takes it again. It may return without that.
    pub fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
        guard.0 = guard.0.take().map(|held| self.0.wait(held).unwrap_or_else(PoisonError::into_inner));
    }

    /// As [`Condvar::wait`], for so long at most.
    pub fn wait_for<T>(&self, guard: &mut MutexGuard<'_, T>, time: Duration) {
        guard.0 = guard.0.take().map(|held| {
            let woken = self.0.wait_timeout(held, time);
            woken.unwrap_or_else(PoisonError::into_inner).0
        });
    }

    /// Wakes every waiter, all at once.
    pub fn notify_all(&self) {
        self.0.notify_all();
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        match &self.0 {
            Some(held) => held,
            None => unreachable!("it is held outside of `Condvar::wait`, which borrows it"),
        }
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        match &mut self.0 {
            Some(held) => held,
            None => unreachable!("it is held outside of `Condvar::wait`, which borrows it"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn all_waiters_are_woken_and_a_panic_keeps_no_one_out() {
        let pair = Arc::new((Mutex::new(0), Condvar::new()));
        let panicked = pair.clone();
        let died = std::thread::spawn(move || {
            let _held = panicked.0.lock();
            panic!("with the lock held");
        });
        assert!(died.join().is_err());
        let wait = || {
            let pair = pair.clone();
            std::thread::spawn(move || {
                let mut value = pair.0.lock();
                while *value == 0 {
                    pair.1.wait(&mut value);
                }
                *value += 1;
            })
        };
        let waiters = [wait(), wait(), wait()];
        *pair.0.lock() = 1;
        pair.1.notify_all();
        for waiter in waiters {
            waiter.join().expect("it was woken");
        }
        assert_eq!(*pair.0.lock(), 4);
    }
}
