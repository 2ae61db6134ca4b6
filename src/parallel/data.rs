//! Data parallelism: every rank has the whole model and a share of each batch, and the ranks average their gradients.

use std::ops::Range;
use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};

use super::communicator::{Communicator, Pending, first_difference};
use super::share::share;
use crate::check::{check_dtype, check_number, compute_dtype};
use crate::error::{AttentionError, Result};
use crate::gradient::collecting_backward;
use crate::memory;
use crate::train::gradients::{error, of};

/// The bytes of gradients that are summed in one call. Few enough that the first sum starts early in the backward pass, and enough that
/// a call's own time doesn't count.
const BUCKET_BYTES: usize = 4 << 20;

/// The parameters of a model that every rank has, and the ranks among which each batch is split.
///
/// Each rank computes the gradients of its rows of the batch. The mean over the ranks, with the numbers of rows as weights, is then the
/// gradient of the whole batch, if the loss is a mean over rows. Every rank gets the same bits, so that equal parameters stay equal.
///
/// Gradients are summed in buckets of about 4 MiB, in the order of the parameters from the last to the first, as
/// `DistributedDataParallel` does. They are summed in f32 (f64 for f64). A parameter without a gradient on some of the ranks has one of
/// zeros there; without one on every rank it gets none (PyTorch: `find_unused_parameters`).
///
/// [`average`](Self::average) takes the gradients of a whole backward pass, and only the packing of a bucket runs beside the sums of
/// those before it. For sums during the backward pass, cut the model into segments and give the gradients of each one to
/// [`Averaging::add`] as soon as [`backward_from`] has them.
///
/// # Examples
///
/// ```
/// use candle_attention::parallel::{DataParallel, threads};
/// use candle_core::{Device, Tensor, Var};
///
/// let batch = [1f32, 2.0, 3.0, 10.0];
/// threads(3, |communicator| {
///     let weight = Var::new(2f32, &Device::Cpu)?;
///     let data_parallel = DataParallel::new(&[("weight".into(), weight.clone())], &communicator)?;
///     data_parallel.broadcast_parameters(0)?;
///     let rows = data_parallel.rows(batch.len()); // 0..2, 2..3, 3..4
///     let loss = Tensor::new(&batch[rows.clone()], &Device::Cpu)?.broadcast_mul(&weight)?.mean_all()?;
///     let gradients = data_parallel.average(&loss.backward()?, rows.len() as f64)?;
///     assert_eq!(gradients.get(&weight).unwrap().to_scalar::<f32>()?, 4.0); // mean of 1, 2, 3, 10
///     Ok(())
/// })?;
/// # Ok::<(), candle_attention::Error>(())
/// ```
///
/// Source: Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training" (VLDB 2020), section 3.
#[derive(Clone, Debug)]
pub struct DataParallel {
    parameters: Vec<(String, Var)>,
    communicator: Arc<dyn Communicator>,
    /// The parameters of each bucket, which have one dtype to compute in and one device.
    buckets: Vec<Range<usize>>,
}

impl DataParallel {
    /// The parameters in their order, which is the same on all ranks. A good order is that in which the forward pass uses them.
    ///
    /// # Errors
    ///
    /// [`AttentionError::Ranks`](crate::AttentionError::Ranks) on every rank, if the ranks disagree on the number of parameters, or on the
    /// name, shape or dtype of one; a dtype other than f16, bf16, f32 and f64; a rank that is gone.
    pub fn new(parameters: &[(String, Var)], communicator: &Arc<dyn Communicator>) -> Result<Self> {
        agree(parameters, communicator.as_ref())?;
        for (_, var) in parameters {
            check_dtype("parameter", var.dtype())?;
        }
        let (parameters, communicator) = (parameters.to_vec(), communicator.clone());
        Ok(Self { buckets: buckets_of(&parameters, BUCKET_BYTES), parameters, communicator })
    }

    /// The same with buckets of at least so many bytes, but for the last one.
    ///
    /// # Errors
    ///
    /// [`AttentionError::Ranks`](crate::AttentionError::Ranks) on every rank, if the ranks disagree; a rank that is gone.
    pub fn with_bucket_bytes(self, bytes: usize) -> Result<Self> {
        self.communicator.agree("bytes of a bucket", &bytes.to_string())?;
        Ok(Self { buckets: buckets_of(&self.parameters, bytes), ..self })
    }

    /// The ranks.
    pub fn communicator(&self) -> &Arc<dyn Communicator> {
        &self.communicator
    }

    /// This rank's rows of a batch of so many: each rank has consecutive ones, and the first ranks have one more if they can't all have
    /// as many. With fewer rows than ranks, the last ranks have none.
    pub fn rows(&self, rows: usize) -> Range<usize> {
        share(rows, self.communicator.rank(), self.communicator.size())
    }

    /// Gives every rank the parameters of rank `root`.
    ///
    /// # Errors
    ///
    /// A `root` that isn't a rank; a rank that is gone; too little memory.
    pub fn broadcast_parameters(&self, root: usize) -> Result<()> {
        let is_root = self.communicator.rank() == root;
        for (_, var) in &self.parameters {
            let theirs = self.communicator.broadcast(is_root.then_some(var.as_tensor()), root)?;
            if !is_root {
                var.set(&theirs.to_device(var.device())?)?;
            }
        }
        Ok(())
    }

    /// The mean of all ranks' gradients, Σ weight · gradient / Σ weight, where `weight` is the number of what this rank's loss is a mean
    /// of, or 1 if all ranks have as many. With a weight of 0, this rank's gradients don't count. Each mean is contiguous and in f32, or
    /// in f64 for a parameter in f64.
    ///
    /// # Errors
    ///
    /// Those of [`start`](Self::start), [`Averaging::add`] and [`Averaging::finish`].
    pub fn average(&self, gradients: &GradStore, weight: f64) -> Result<GradStore> {
        let mut averaging = self.start(weight)?;
        averaging.add(gradients)?;
        averaging.finish()
    }

    /// Starts a mean as that of [`average`](Self::average), of gradients that come in parts.
    ///
    /// # Errors
    ///
    /// A weight that isn't 0 or a finite number above 0, also in f32.
    pub fn start(&self, weight: f64) -> Result<Averaging<'_>> {
        let expected = "0 or a finite number above 0, also in f32";
        check_number("weight", Some(weight), expected, |x| x == 0.0 || x > 0.0 && (x as f32).is_normal())?;
        // The mean of one rank is its gradient, to the last bit.
        let weight = if self.communicator.size() == 1 && weight > 0.0 { 1.0 } else { weight };
        Ok(Averaging { of: self, weight, gradients: vec![None; self.parameters.len()], pending: Vec::new() })
    }

    /// Starts the sum of a bucket: every gradient times the weight, then a 1 for each parameter that has a gradient, then the weight.
    fn start_sum(&self, bucket: &Range<usize>, gradients: &mut [Option<Tensor>], weight: f64) -> Result<Pending> {
        let parameters = &self.parameters[bucket.clone()];
        let (device, dtype) = (parameters[0].1.device(), compute_dtype(parameters[0].1.dtype()));
        let count = memory::sum(parameters.iter().map(|(_, var)| var.elem_count()));
        memory::ask("bucket of gradients", device, memory::bytes(&[count], dtype).saturating_mul(3))?;
        let (mut parts, mut tail) = (Vec::new(), Vec::new());
        for ((_, var), gradient) in parameters.iter().zip(&mut gradients[bucket.clone()]) {
            // What is packed is freed.
            let gradient = gradient.take().filter(|_| weight > 0.0);
            tail.push(if gradient.is_some() { 1.0 } else { 0.0 });
            parts.push(match gradient {
                Some(gradient) => weighted(&gradient.flatten_all()?.to_dtype(dtype)?, weight)?,
                None => Tensor::zeros(var.elem_count(), dtype, device)?,
            });
        }
        tail.push(weight);
        parts.push(Tensor::new(tail, device)?.to_dtype(dtype)?);
        self.communicator.start_all_reduce(&Tensor::cat(&parts, 0)?)
    }

    /// The means of a bucket from its sum.
    fn take_means(&self, bucket: &Range<usize>, sum: &Tensor, means: &mut GradStore) -> Result<()> {
        let parameters = &self.parameters[bucket.clone()];
        let (tail, mut first) = (parameters.len() + 1, 0);
        let tail = sum.narrow(0, sum.elem_count() - tail, tail)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        let total = tail[parameters.len()];
        check_number("weight of all ranks", Some(total), "a finite number above 0", |x| x > 0.0 && x.is_finite())?;
        for ((_, var), ranks) in parameters.iter().zip(tail) {
            let count = var.elem_count();
            if ranks > 0.0 {
                let part = sum.narrow(0, first, count)?;
                // A part of its own, so that the bucket is freed.
                means.insert(var, part.affine(1.0 / total, 0.0)?.reshape(var.shape())?);
            }
            first += count;
        }
        Ok(())
    }
}

/// A mean of gradients over the ranks that is under way.
#[must_use = "what was started must be finished"]
pub struct Averaging<'a> {
    of: &'a DataParallel,
    weight: f64,
    /// This rank's gradients that aren't on the way.
    gradients: Vec<Option<Tensor>>,
    /// The sums that are, of the last buckets of all.
    pending: Vec<Pending>,
}

impl Averaging<'_> {
    /// Takes the gradients that a part of the backward pass has computed, all at once for each parameter. Starts the sums of the buckets
    /// that are now complete, from the last one on, and returns at once. They go on while the rank computes.
    ///
    /// If a parameter may lack its gradient on some of the ranks, its bucket starts there in [`finish`](Self::finish). Then other calls of
    /// the communicator come before the first `add` or after `finish`, so that all ranks have the same order.
    ///
    /// # Errors
    ///
    /// A gradient of another shape, dtype or device than its parameter, or of a parameter that had one before; too little memory. Then the
    /// mean can't be finished: the other ranks get an error if this one ends.
    pub fn add(&mut self, gradients: &GradStore) -> Result<()> {
        let all = &self.of.buckets;
        let first_sent = all.len().checked_sub(self.pending.len() + 1).map_or(0, |last| all[last].end);
        for (index, (name, var)) in self.of.parameters.iter().enumerate() {
            let Some(gradient) = of(gradients, name, var)? else { continue };
            if index >= first_sent || self.gradients[index].is_some() {
                return Err(error(name, "one gradient in all parts of the backward pass", "a second one").into());
            }
            self.gradients[index] = Some(gradient);
        }
        while let Some(bucket) =
            self.next_bucket().filter(|bucket| self.gradients[bucket.clone()].iter().all(Option::is_some))
        {
            self.start_sum(&bucket)?;
        }
        Ok(())
    }

    /// Starts the other sums and waits for all. The store holds the means.
    ///
    /// # Errors
    ///
    /// [`AttentionError::Number`](crate::AttentionError::Number) on every rank, if all weights are 0;
    /// [`AttentionError::Communication`](crate::AttentionError::Communication) for a rank that is gone; too little memory.
    pub fn finish(mut self) -> Result<GradStore> {
        while let Some(bucket) = self.next_bucket() {
            self.start_sum(&bucket)?;
        }
        let (mut means, mut failed) = (GradStore::default(), Ok(()));
        for (bucket, pending) in self.of.buckets.iter().rev().zip(self.pending) {
            let sum = pending.wait()?.remove(0);
            // All ranks wait for all sums, and so are at the same place after an error.
            failed = failed.and_then(|()| self.of.take_means(bucket, &sum, &mut means));
        }
        failed.map(|()| means)
    }

    fn next_bucket(&self) -> Option<Range<usize>> {
        let buckets = &self.of.buckets;
        buckets.len().checked_sub(self.pending.len() + 1).map(|next| buckets[next].clone())
    }

    fn start_sum(&mut self, bucket: &Range<usize>) -> Result<()> {
        self.pending.push(self.of.start_sum(bucket, &mut self.gradients, self.weight)?);
        Ok(())
    }
}

/// The gradients of a segment of a model, from the gradient of its output: those of Σ output · gradient. The pass is
/// that of [`backward`](crate::train::backward).
///
/// A model in segments lets the ranks sum the gradients of its end while those of its start are computed. The input of each segment
/// is a variable that holds the output of the segment before, and whose gradient goes on from there.
///
/// # Errors
///
/// Two shapes, dtypes or devices; too little memory.
///
/// # Examples
///
/// ```
/// use candle_attention::parallel::{DataParallel, backward_from, threads};
/// use candle_attention::train::backward;
/// use candle_core::{Device, Var};
///
/// threads(2, |communicator| {
///     let (first, second) = (Var::new(3f32, &Device::Cpu)?, Var::new(5f32, &Device::Cpu)?);
///     let parameters = [("first".into(), first.clone()), ("second".into(), second.clone())];
///     // A bucket for each parameter: the defaults are for larger ones.
///     let data_parallel = DataParallel::new(&parameters, &communicator)?.with_bucket_bytes(1)?;
///
///     let middle = (first.as_tensor() * 2.0)?;
///     let cut = Var::from_tensor(&middle.detach())?;
///     let loss = (cut.as_tensor() * second.as_tensor())?;
///
///     let mut averaging = data_parallel.start(1.0)?;
///     let gradients = backward(&loss)?;
///     averaging.add(&gradients)?; // The sum of the second gradient starts here.
///     averaging.add(&backward_from(&middle, gradients.get(&cut).unwrap())?)?;
///     let means = averaging.finish()?;
///     assert_eq!(means.get(&first).unwrap().to_scalar::<f32>()?, 2.0 * 5.0);
///     assert_eq!(means.get(&second).unwrap().to_scalar::<f32>()?, 2.0 * 3.0);
///     Ok(())
/// })?;
/// # Ok::<(), candle_attention::Error>(())
/// ```
pub fn backward_from(output: &Tensor, gradient: &Tensor) -> Result<GradStore> {
    memory::ask_for("output times its gradient", 2, output, output.dtype())?;
    Ok(collecting_backward(&(output * gradient.detach())?.sum_all()?)?)
}

fn weighted(gradient: &Tensor, weight: f64) -> candle_core::Result<Tensor> {
    if weight == 1.0 { Ok(gradient.clone()) } else { gradient.affine(weight, 0.0) }
}

/// An error on every rank unless all ranks have the same parameters. It names the first that differs.
fn agree(parameters: &[(String, Var)], communicator: &dyn Communicator) -> Result<()> {
    let line = |(name, var): &(String, Var)| format!("{name:?}, {} {:?}", var.dtype().as_str(), var.dims());
    let ours = parameters.iter().map(line).collect::<Vec<_>>().join("\n");
    let Some((ranks, [first, second])) = first_difference(communicator, "parameters", &ours)? else { return Ok(()) };
    let (mut first, mut second) = (first.lines(), second.lines());
    let mut index = 0;
    let got = loop {
        match (first.next(), second.next()) {
            (Some(ours), Some(theirs)) if ours == theirs => index += 1,
            lines => break [lines.0, lines.1].map(|line| line.unwrap_or("no parameter").to_string()),
        }
    };
    Err(AttentionError::Ranks { what: format!("parameter {index}"), ranks, got }.into())
}

/// Consecutive parameters from the last to the first, each bucket with at least so many bytes, but for the one of the first parameters.
/// In the order of the parameters.
fn buckets_of(parameters: &[(String, Var)], bytes: usize) -> Vec<Range<usize>> {
    let kind = |index: usize| {
        let var = &parameters[index].1;
        (compute_dtype(var.dtype()), var.device().location())
    };
    let (mut buckets, mut end, mut held) = (Vec::new(), parameters.len(), 0usize);
    for index in (0..parameters.len()).rev() {
        held = held.saturating_add(memory::bytes(parameters[index].1.dims(), kind(index).0));
        if held >= bytes || index == 0 || kind(index - 1) != kind(index) {
            buckets.push(index..end);
            (end, held) = (index, 0);
        }
    }
    buckets.reverse();
    buckets
}
