//! Blocks in files: this crate's own, and those of other programs.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;

use crate::block::config::TransformerBlockConfig;
use crate::block::layouts::plan;
use crate::block::transformer::TransformerBlock;
use crate::checkpoint::{self, Header, LayerKind, Layout, LayoutFile};
use crate::error::Result;

impl TransformerBlock {
    /// Loads a block that [`save`](Self::save) wrote. Its parameters are variables, so that training can continue (see
    /// [`vars`](Self::vars)).
    ///
    /// # Errors
    ///
    /// As [`SelfAttention::load`](crate::SelfAttention::load).
    ///
    /// # Examples
    ///
    /// ```
    /// use candle_attention::SelfAttentionConfig;
    /// use candle_attention::block::{MlpConfig, NormConfig, TransformerBlock, TransformerBlockConfig};
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::{VarBuilder, VarMap};
    ///
    /// let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    /// let config = TransformerBlockConfig::new(SelfAttentionConfig::new(8, 2), MlpConfig::new(8, 16), NormConfig::layer(1e-5));
    /// let block = TransformerBlock::new(&config, vb)?;
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("block.safetensors");
    /// block.save(&path)?;
    /// let loaded = TransformerBlock::load(&path, &Device::Cpu)?;
    /// assert_eq!(loaded.config(), &config);
    /// let x = Tensor::randn(0f32, 1.0, (3, 8), &Device::Cpu)?;
    /// assert_eq!(loaded.forward(&x)?.to_vec2::<f32>()?, block.forward(&x)?.to_vec2::<f32>()?);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let path = path.as_ref();
        Self::from_bytes(&attention_files::read(path)?, device).map_err(|error| error.at(path))
    }

    /// As [`load`](Self::load), from the bytes of a file.
    ///
    /// # Errors
    ///
    /// As [`load`](Self::load).
    pub fn from_bytes(bytes: &[u8], device: &Device) -> Result<Self> {
        let (config, parameters, dtype): (TransformerBlockConfig, _, _) =
            checkpoint::from_bytes(bytes, LayerKind::TransformerBlock, device)?;
        config.check_for(dtype)?;
        Self::from_parameters(&config, parameters, "")
    }

    /// Saves parameters and config to a safetensors file, as [`SelfAttention::save`](crate::SelfAttention::save) does.
    ///
    /// # Errors
    ///
    /// As [`SelfAttention::save`](crate::SelfAttention::save).
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        Ok(attention_files::write(path.as_ref(), &self.to_bytes()?)?)
    }

    /// The bytes of the file that [`save`](Self::save) writes.
    ///
    /// # Errors
    ///
    /// As [`SelfAttention::to_bytes`](crate::SelfAttention::to_bytes).
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        self.attention().check_described()?;
        self.check_plain()?;
        let header = Header { layer: LayerKind::TransformerBlock, config: self.config() };
        checkpoint::to_bytes(&header, self.parameters())
    }

    /// A block from weights that another program trained. The prefix of `vb` is the name of the block in the model:
    /// `encoder.layer.0` in BERT, `h.0` in GPT-2, `model.layers.0` in Llama, Qwen3, Gemma 2 and Phi-3. The config gives what a
    /// checkpoint doesn't contain: heads, activation, epsilon, and where the norms stand. With [`Layout::Llama`] a
    /// [sandwich](crate::block::NormPlacement::Sandwich) has the names of Gemma 2.
    ///
    /// Whether the parameters are variables or constants depends on `vb`, as in
    /// [`SelfAttention::from_layout`](crate::SelfAttention::from_layout).
    ///
    /// # Errors
    ///
    /// As [`SelfAttention::from_layout`](crate::SelfAttention::from_layout); also a layout that has no whole blocks, and norms at
    /// other places than in the layout's models.
    ///
    /// # Examples
    ///
    /// ```
    /// use candle_attention::block::{MlpConfig, NormConfig, TransformerBlock, TransformerBlockConfig};
    /// use candle_attention::{Layout, SelfAttentionConfig};
    /// use candle_core::{DType, Device};
    /// use candle_nn::{VarBuilder, VarMap};
    ///
    /// let attention = SelfAttentionConfig { is_causal: true, qkv_bias: false, out_bias: false, ..SelfAttentionConfig::new(8, 2) };
    /// let config = TransformerBlockConfig::new(attention, MlpConfig::swiglu(8, 24), NormConfig::rms(1e-5));
    /// let block = TransformerBlock::new(&config, VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu))?;
    ///
    /// let tensors = block.to_layout(Layout::Llama)?;
    /// assert!(tensors.iter().any(|(name, _)| name == "mlp.gate_proj.weight"));
    /// let vb = VarBuilder::from_tensors(tensors.into_iter().collect(), DType::F32, &Device::Cpu);
    /// let again = TransformerBlock::from_layout(Layout::Llama, &config, vb)?;
    /// let up = |block: &TransformerBlock| block.mlp().up().weight().to_vec2::<f32>();
    /// assert_eq!(up(&again)?, up(&block)?);
    /// # Ok::<(), candle_attention::Error>(())
    /// ```
    pub fn from_layout(layout: Layout, config: &TransformerBlockConfig, vb: VarBuilder) -> Result<Self> {
        config.check_for(vb.dtype())?;
        let parameters = checkpoint::from_var_builder(plan(layout, config)?, &vb)?;
        Self::from_parameters(config, parameters, &vb.prefix())
    }

    /// As [`from_layout`](Self::from_layout), from a [`LayoutFile`] on disk. Its parameters are variables. Only the tensors under
    /// the file's prefix are read.
    ///
    /// # Errors
    ///
    /// As [`from_layout`](Self::from_layout) and [`SelfAttention::load_layout`](crate::SelfAttention::load_layout).
    pub fn load_layout(config: &TransformerBlockConfig, file: &LayoutFile) -> Result<Self> {
        config.check_for(file.dtype.unwrap_or(DType::F32))?;
        let parameters = checkpoint::from_file(file, plan(file.layout, config)?)?;
        Self::from_parameters(config, parameters, &file.prefix)
    }

    /// The parameters as another program names and arranges them, without a prefix, in the block's dtype. They are copies.
    ///
    /// # Errors
    ///
    /// A block with weights in blocks or adapters that aren't merged, or with parameters that the layout has no name for; otherwise as [`from_layout`](Self::from_layout).
    pub fn to_layout(&self, layout: Layout) -> Result<Vec<(String, Tensor)>> {
        self.check_plain()?;
        checkpoint::to_tensors(&plan(layout, self.config())?, &self.parameters())
    }

    /// Saves the tensors of [`to_layout`](Self::to_layout) as a safetensors file. Each name is preceded by `prefix` and a dot,
    /// unless the prefix is empty. The file is replaced as a whole or not at all.
    ///
    /// # Errors
    ///
    /// As [`to_layout`](Self::to_layout) and [`save`](Self::save).
    pub fn save_layout(&self, layout: Layout, prefix: &str, path: impl AsRef<Path>) -> Result<()> {
        let bytes = checkpoint::to_file(&self.to_layout(layout)?, prefix)?;
        Ok(attention_files::write(path.as_ref(), &bytes)?)
    }
}
