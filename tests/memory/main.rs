//! No call aborts the process for lack of memory: each returns an error that says what there is no memory for.
//!
//! A test fills the memory of its process up to a hole, and makes the call. With a small hole the call must fail, with a large one it
//! must succeed, and with any hole between it must return. Broadcast views have any shape and take no memory.

#[cfg(target_os = "linux")]
#[path = "../common/own_process.rs"]
mod own_process;

#[cfg(target_os = "linux")]
mod attention;
#[cfg(target_os = "linux")]
mod heatmaps;
#[cfg(target_os = "linux")]
mod layers;
#[cfg(target_os = "linux")]
mod masks;
#[cfg(target_os = "linux")]
mod room;

#[cfg(not(target_os = "linux"))]
#[test]
#[ignore = "only Linux limits the address space of a process (ulimit -v)"]
fn calls_without_memory_return_errors() {}
