//! Blocks that several ranks share: tensor parallelism.

use std::sync::Arc;

use crate::block::transformer::TransformerBlock;
use crate::error::Result;
use crate::parallel::communicator::Communicator;
use crate::parallel::tensor::TensorParallel;

impl TransformerBlock {
    /// This rank's part of the block, which all ranks share (tensor parallelism): its heads of the
    /// [attention](crate::SelfAttention::shard), its hidden numbers of the [MLP](crate::block::Mlp::shard), and all norms. All ranks call it
    /// with the same block. The part has copies of its parameters, each a variable if it was one, so that the whole block can be dropped.
    ///
    /// All ranks call the part's methods with the same input and options, and get the same output, which is that of the whole block but for
    /// rounding, with dropout too. Every gradient is that of the whole block, or of this rank's part of it, if all ranks make the same backward
    /// pass. In each pass a rank sends 4 (n - 1) / n of the bytes of x, in two sums.
    ///
    /// # Errors
    ///
    /// Those of [`SelfAttention::shard`](crate::SelfAttention::shard) and [`Mlp::shard`](crate::block::Mlp::shard).
    ///
    /// # Examples
    ///
    /// Every rank makes the same block, from a seed or a file, and keeps its part. Rank 0 saves the whole.
    ///
    /// ```
    /// use candle_attention::SelfAttentionConfig;
    /// use candle_attention::block::{MlpConfig, NormConfig, TransformerBlock, TransformerBlockConfig};
    /// use candle_attention::parallel::threads;
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::{VarBuilder, VarMap};
    ///
    /// let attention = SelfAttentionConfig { is_causal: true, ..SelfAttentionConfig::new(8, 4) };
    /// let config = TransformerBlockConfig::new(attention, MlpConfig::swiglu(8, 24), NormConfig::rms(1e-5));
    /// let whole = || TransformerBlock::new(&config, VarBuilder::from_varmap(&VarMap::new(), DType::F64, &Device::Cpu));
    /// let x = Tensor::randn(0f64, 1.0, (2, 5, 8), &Device::Cpu)?;
    /// let expected = whole()?.forward(&x)?;
    /// # let folder = tempfile::tempdir().unwrap();
    /// # let path = folder.path().join("block.safetensors");
    ///
    /// threads(2, |communicator| {
    ///     let block = whole()?.shard(&communicator)?;
    ///     assert_eq!(block.attention().q_proj().weight().dims(), [4, 8]); // two of the four heads
    ///     assert_eq!(block.mlp().down().weight().dims(), [8, 12]);
    ///
    ///     let y = block.forward_t(&x, true)?;
    ///     assert!((&y - &expected)?.abs()?.max_all()?.to_scalar::<f64>()? < 1e-12);
    ///     let grads = y.sqr()?.mean_all()?.backward()?;
    ///     assert!(block.vars().iter().all(|var| grads.get(var).is_some()));
    ///
    ///     let whole = block.gather()?;
    ///     if communicator.rank() == 0 {
    ///         whole.save(&path)?;
    ///     }
    ///     Ok(())
    /// })?;
    /// assert_eq!(TransformerBlock::load(&path, &Device::Cpu)?.config(), &config);
    /// # Ok::<(), candle_attention::Error>(())
    /// ```
    ///
    /// Source: Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism" (2019), section 3.
    pub fn shard(&self, communicator: &Arc<dyn Communicator>) -> Result<Self> {
        let ranks = TensorParallel::new(communicator);
        ranks.agree_on("block to share", format!("{:?}", self.config()), self.check_plain().map_err(Into::into))?;
        let (attention, mlp) = (self.attention().shard(communicator)?, self.mlp().shard(communicator)?);
        self.with_parts(attention, mlp, |x| ranks.same("parameter of a norm", x))
    }

    /// The whole block from its parts, on every rank; a clone of a block that is no part. All ranks call it. Files and layouts hold whole
    /// blocks: gather a part before it is saved.
    ///
    /// # Errors
    ///
    /// A rank that is gone; too little memory.
    pub fn gather(&self) -> Result<Self> {
        if !self.mlp().is_part() {
            return Ok(self.clone());
        }
        self.with_parts(self.attention().gather()?, self.mlp().gather()?, TensorParallel::copy)
    }
}
