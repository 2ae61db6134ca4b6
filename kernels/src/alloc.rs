//! Allocation that may fail: an error instead of an abort of the process.

use crate::error::Error;

/// An empty vector with room for `count` elements.
///
/// # Errors
///
/// [`Error::Memory`] if there is no memory for them; `what` says in the error what it was for.
///
/// # Examples
///
/// ```
/// use attention_kernels::{Error, reserve};
///
/// assert!(reserve::<f32>("context", 8)?.capacity() >= 8);
/// assert!(matches!(reserve::<f32>("context", usize::MAX), Err(Error::Memory { what: "context", .. })));
/// # Ok::<(), Error>(())
/// ```
pub fn reserve<T>(what: &'static str, count: usize) -> Result<Vec<T>, Error> {
    let mut vector = Vec::new();
    let bytes = count.saturating_mul(size_of::<T>());
    vector.try_reserve_exact(count).map_err(|_| Error::Memory { what, bytes })?;
    Ok(vector)
}

/// A vector of `count` elements that all are `value`.
///
/// # Errors
///
/// As [`reserve`].
///
/// # Examples
///
/// ```
/// use attention_kernels::filled;
///
/// assert_eq!(filled("lengths", 3, 7)?, [7, 7, 7]);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
pub fn filled<T: Clone>(what: &'static str, count: usize, value: T) -> Result<Vec<T>, Error> {
    let mut vector = reserve(what, count)?;
    vector.resize(count, value);
    Ok(vector)
}

/// A vector of the items of an iterator that knows their number.
///
/// # Errors
///
/// As [`reserve`].
///
/// # Examples
///
/// ```
/// use attention_kernels::collected;
///
/// assert_eq!(collected("squares", (1..4).map(|x| x * x))?, [1, 4, 9]);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
pub fn collected<T>(what: &'static str, items: impl ExactSizeIterator<Item = T>) -> Result<Vec<T>, Error> {
    let mut vector = reserve(what, items.len())?;
    vector.extend(items);
    Ok(vector)
}

/// Lets the process keep memory that is freed, for its next allocations, and returns whether the allocator can do that.
///
/// A step of training allocates and frees large tensors again and again. glibc gives much of that memory back to the system each
/// time, which then clears every page anew: up to a fifth of a step. After this call the process holds as much memory as it
/// ever needed. Call it at the start of the program, before other threads allocate. It takes effect with glibc's allocator (Linux); another one, such as a `#[global_allocator]`, has a policy of its
/// own.
///
/// # Examples
///
/// ```
/// let is_glibc = cfg!(all(target_os = "linux", target_env = "gnu"));
/// assert_eq!(attention_kernels::keep_freed_memory(), is_glibc);
/// ```
pub fn keep_freed_memory() -> bool {
    #[cfg(all(target_os = "linux", target_env = "gnu", not(miri)))]
    {
        use std::ffi::c_int;
        // The numbers of malloc.h.
        const M_TRIM_THRESHOLD: c_int = -1;
        const M_MMAP_MAX: c_int = -4;
        unsafe extern "C" {
            fn mallopt(parameter: c_int, value: c_int) -> c_int;
        }
        // SAFETY: mallopt checks its arguments and takes the allocator's lock; threads that allocate meanwhile read the old or the new
        // number. Minus one switches trimming off; no mappings means that large blocks come from the heap, too.
        unsafe { mallopt(M_TRIM_THRESHOLD, -1) == 1 && mallopt(M_MMAP_MAX, 0) == 1 }
    }
    #[cfg(not(all(target_os = "linux", target_env = "gnu", not(miri))))]
    false
}

/// A copy of a slice.
pub(crate) fn copy_of<T: Clone>(what: &'static str, slice: &[T]) -> Result<Vec<T>, Error> {
    collected(what, slice.iter().cloned())
}

/// The product of some sizes, or the error that memory can't hold as many elements.
pub(crate) fn product(what: &'static str, sizes: &[usize]) -> Result<usize, Error> {
    let product = sizes.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
    product.filter(|&product| product <= isize::MAX as usize).ok_or(Error::Memory { what, bytes: usize::MAX })
}
