//! What ranks do together, whatever carries it.

use candle_core::Tensor;

use crate::error::{AttentionError, Result};

/// One rank's way to the others.
///
/// All ranks call the same functions in the same order, as in MPI. Tensors are contiguous or not, of any dtype, on the CPU
/// (or on the device that the implementation serves); results are on the device of the input and carry no gradient.
/// The same number of ranks gives the same bits in every run, whatever carries the messages: sums are in the order of the ranks,
/// half types are summed in f32.
///
/// A result holds the numbers of the call's start, even if a variable is set later. One exception: a rank's own tensor isn't sent and comes
/// back without a copy, unless it is a variable. So an own view of a variable still changes with the variable.
///
/// # Errors
///
/// [`AttentionError::Ranks`](crate::AttentionError::Ranks) on every rank if the ranks disagree on what they exchange, with both sides;
/// [`AttentionError::Communication`](crate::AttentionError::Communication) if a rank is gone. No function hangs for a rank that is gone.
pub trait Communicator: Send + Sync + std::fmt::Debug {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// The number of ranks.
    fn size(&self) -> usize;

    /// Starts to send `tensors` to rank `to` and to receive as many from rank `from`. Returns at once, so that computing goes
    /// on meanwhile. The shapes and dtypes of what comes may be others than those of what goes.
    ///
    /// All ranks exchange at the same time: `to` receives from this rank, and a rank without a partner exchanges with itself.
    ///
    /// # Examples
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// candle_attention::parallel::threads(4, |communicator| {
    ///     let ours = Tensor::new(&[communicator.rank() as f32], &Device::Cpu)?;
    ///     // Two pairs.
    ///     let partner = communicator.rank() ^ 1;
    ///     let pending = communicator.start_exchange(&[ours], partner, partner)?;
    ///     // Computing goes on here.
    ///     assert_eq!(pending.wait()?[0].to_vec1::<f32>()?, [partner as f32]);
    ///     Ok(())
    /// })?;
    /// # Ok::<(), candle_attention::Error>(())
    /// ```
    fn start_exchange(&self, tensors: &[Tensor], to: usize, from: usize) -> Result<Pending>;

    /// Starts the sum of a tensor over all ranks; every rank gets it, as the only tensor. Its dtype is f32, f64, bf16 or f16.
    ///
    /// Each rank sends 2 (n - 1) / n of the tensor's bytes, where n is the number of ranks.
    ///
    /// # Examples
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// candle_attention::parallel::threads(3, |communicator| {
    ///     let ours = Tensor::new(&[communicator.rank() as f32], &Device::Cpu)?;
    ///     let pending = communicator.start_all_reduce(&ours)?;
    ///     // Computing goes on here.
    ///     assert_eq!(pending.wait()?[0].to_vec1::<f32>()?, [0.0 + 1.0 + 2.0]);
    ///     Ok(())
    /// })?;
    /// # Ok::<(), candle_attention::Error>(())
    /// ```
    fn start_all_reduce(&self, tensor: &Tensor) -> Result<Pending>;

    /// Tensor `i` of every rank goes to rank `i`. The result has the tensor of every rank, in order.
    ///
    /// # Examples
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// candle_attention::parallel::threads(2, |communicator| {
    ///     let tensor = |number: usize| Tensor::new(number as u32, &Device::Cpu);
    ///     let ours = [tensor(10 * communicator.rank())?, tensor(10 * communicator.rank() + 1)?];
    ///     let theirs = communicator.all_to_all(&ours)?;
    ///     assert_eq!(theirs[0].to_scalar::<u32>()?, communicator.rank() as u32);
    ///     assert_eq!(theirs[1].to_scalar::<u32>()?, 10 + communicator.rank() as u32);
    ///     Ok(())
    /// })?;
    /// # Ok::<(), candle_attention::Error>(())
    /// ```
    fn all_to_all(&self, tensors: &[Tensor]) -> Result<Vec<Tensor>>;

    /// The tensor of every rank, in order. Their shapes may differ.
    ///
    /// # Examples
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// candle_attention::parallel::threads(3, |communicator| {
    ///     let ours = Tensor::zeros(communicator.rank() + 1, candle_core::DType::F32, &Device::Cpu)?;
    ///     let all = communicator.all_gather(&ours)?;
    ///     assert_eq!(all.iter().map(|tensor| tensor.elem_count()).collect::<Vec<_>>(), [1, 2, 3]);
    ///     Ok(())
    /// })?;
    /// # Ok::<(), candle_attention::Error>(())
    /// ```
    fn all_gather(&self, tensor: &Tensor) -> Result<Vec<Tensor>>;

    /// The tensor of rank `root`; the others give none that counts.
    ///
    /// # Examples
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// candle_attention::parallel::threads(3, |communicator| {
    ///     let ours = match communicator.rank() {
    ///         2 => Some(Tensor::new(&[5u32, 7], &Device::Cpu)?),
    ///         _ => None,
    ///     };
    ///     assert_eq!(communicator.broadcast(ours.as_ref(), 2)?.to_vec1::<u32>()?, [5, 7]);
    ///     Ok(())
    /// })?;
    /// # Ok::<(), candle_attention::Error>(())
    /// ```
    fn broadcast(&self, tensor: Option<&Tensor>, root: usize) -> Result<Tensor>;

    /// Every rank's bytes, in order.
    ///
    /// # Examples
    ///
    /// ```
    /// candle_attention::parallel::threads(2, |communicator| {
    ///     let name = format!("rank {}", communicator.rank());
    ///     assert_eq!(communicator.all_gather_bytes(name.as_bytes())?, [b"rank 0", b"rank 1"]);
    ///     Ok(())
    /// })?;
    /// # Ok::<(), candle_attention::Error>(())
    /// ```
    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Bytes that this rank has sent so far, in all calls that are over, without what describes the tensors.
    ///
    /// # Examples
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// candle_attention::parallel::threads(4, |communicator| {
    ///     let tensor = Tensor::zeros(100, candle_core::DType::F32, &Device::Cpu)?;
    ///     communicator.all_reduce(&tensor)?;
    ///     // 2 (n - 1) / n of the tensor's 400 bytes.
    ///     assert_eq!(communicator.bytes_sent(), 600);
    ///     Ok(())
    /// })?;
    /// # Ok::<(), candle_attention::Error>(())
    /// ```
    fn bytes_sent(&self) -> u64;

    /// Starts to send to the next rank of the ring and to receive from the one before.
    ///
    /// # Examples
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// candle_attention::parallel::threads(3, |communicator| {
    ///     let ours = Tensor::new(&[communicator.rank() as f32], &Device::Cpu)?;
    ///     let before = communicator.start_ring(&[ours])?.wait()?.remove(0);
    ///     assert_eq!(before.to_vec1::<f32>()?, [((communicator.rank() + 2) % 3) as f32]);
    ///     Ok(())
    /// })?;
    /// # Ok::<(), candle_attention::Error>(())
    /// ```
    fn start_ring(&self, tensors: &[Tensor]) -> Result<Pending> {
        let (rank, size) = (self.rank(), self.size());
        self.start_exchange(tensors, (rank + 1) % size, (rank + size - 1) % size)
    }

    /// The sum of a tensor over all ranks.
    ///
    /// # Examples
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// candle_attention::parallel::threads(3, |communicator| {
    ///     let ours = Tensor::new(&[communicator.rank() as f32], &Device::Cpu)?;
    ///     assert_eq!(communicator.all_reduce(&ours)?.to_vec1::<f32>()?, [3.0]);
    ///     Ok(())
    /// })?;
    /// # Ok::<(), candle_attention::Error>(())
    /// ```
    fn all_reduce(&self, tensor: &Tensor) -> Result<Tensor> {
        Ok(self.start_all_reduce(tensor)?.wait()?.remove(0))
    }

    /// An error on every rank, with both sides, unless all ranks say the same of `what`.
    ///
    /// # Examples
    ///
    /// ```
    /// candle_attention::parallel::threads(2, |communicator| {
    ///     communicator.agree("num_heads", "8")?;
    ///     let error = communicator.agree("window", &(64 << communicator.rank()).to_string()).unwrap_err();
    ///     assert_eq!(
    ///         error.to_string(),
    ///         "window: expected the same on every rank, got 64 on rank 0 and 128 on rank 1"
    ///     );
    ///     Ok(())
    /// })?;
    /// # Ok::<(), candle_attention::Error>(())
    /// ```
    fn agree(&self, what: &'static str, ours: &str) -> Result<()> {
        match first_difference(self, what, ours)? {
            None => Ok(()),
            Some((ranks, got)) => Err(AttentionError::Ranks { what: what.to_string(), ranks, got }.into()),
        }
    }
}

/// Rank 0 and the first rank that says something else of `what`, and what both say. `None` if all ranks say the same.
///
/// # Errors
///
/// [`AttentionError::Ranks`] on every rank, if that rank speaks of something else.
pub(super) fn first_difference(
    communicator: &(impl Communicator + ?Sized),
    what: &str,
    ours: &str,
) -> Result<Option<([usize; 2], [String; 2])>> {
    let ours = serde_json::to_vec(&[what, ours]).map_err(candle_core::Error::wrap)?;
    let all = communicator.all_gather_bytes(&ours)?;
    let Some(other) = all.iter().position(|theirs| *theirs != all[0]) else { return Ok(None) };
    let read = |rank: usize| serde_json::from_slice::<[String; 2]>(&all[rank]).map_err(candle_core::Error::wrap);
    let (ranks, [what, first], [their_what, theirs]) = ([0, other], read(0)?, read(other)?);
    if what == their_what {
        return Ok(Some((ranks, [first, theirs])));
    }
    let got = [what, their_what].map(|what| format!("agreement on {what}"));
    Err(AttentionError::Ranks { what: "call of the communicator".to_string(), ranks, got }.into())
}

pub(super) fn check_rank(name: &'static str, rank: usize, size: usize) -> Result<(), AttentionError> {
    if rank < size {
        return Ok(());
    }
    let expected = "a rank, which is less than the number of ranks";
    Err(AttentionError::Number { name, expected, got: rank as f64 })
}

/// Checks the number of tensors of an all_to_all.
pub(super) fn check_count(tensors: &[Tensor], size: usize) -> Result<(), AttentionError> {
    if tensors.len() == size {
        return Ok(());
    }
    let (name, expected) = ("tensors of all_to_all", "as many as ranks");
    Err(AttentionError::Number { name, expected, got: tensors.len() as f64 })
}

/// Messages that are under way.
#[must_use = "what was started must be waited for"]
pub struct Pending(Box<dyn FnOnce() -> Result<Vec<Tensor>> + Send>);

impl Pending {
    /// What `wait` does.
    pub fn new(wait: impl FnOnce() -> Result<Vec<Tensor>> + Send + 'static) -> Self {
        Self(Box::new(wait))
    }

    /// The tensors that have come. Waits for them.
    pub fn wait(self) -> Result<Vec<Tensor>> {
        (self.0)()
    }
}
