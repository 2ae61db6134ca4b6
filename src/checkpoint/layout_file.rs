//! [`LayoutFile`]: a layer in another program's checkpoint.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};

use crate::checkpoint::Layout;

/// A layer in another program's checkpoint, or a whole block: the [`Layout`], the files, and the layer's name in the model.
///
/// # Examples
///
/// ```
/// use candle_attention::{Layout, LayoutFile, SelfAttention, SelfAttentionConfig};
/// use candle_core::{DType, Device};
/// use candle_nn::{VarBuilder, VarMap};
///
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("model.safetensors");
/// # let config = SelfAttentionConfig::new(8, 2);
/// # let made = SelfAttention::new(&config, VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu))?;
/// # made.save_layout(Layout::Bert, "encoder.layer.0.attention", &path)?;
/// let file = LayoutFile::new(Layout::Bert, &path).prefix("encoder.layer.0.attention").dtype(DType::F64);
/// let attention = SelfAttention::load_layout(&config, &file)?;
/// assert_eq!(attention.q_proj().weight().dtype(), DType::F64);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct LayoutFile {
    pub(crate) layout: Layout,
    pub(crate) path: PathBuf,
    pub(crate) prefix: String,
    pub(crate) dtype: Option<DType>,
    pub(crate) device: Device,
}

impl LayoutFile {
    /// The whole checkpoint at `path`: a safetensors file, the `*.index.json` of a sharded one, or a folder with
    /// either.
    pub fn new(layout: Layout, path: impl AsRef<Path>) -> Self {
        let path = path.as_ref().to_path_buf();
        Self { layout, path, prefix: String::new(), dtype: None, device: Device::Cpu }
    }

    /// Restricts the checkpoint to the tensors whose names begin with this prefix and a dot.
    pub fn prefix(self, prefix: &str) -> Self {
        Self { prefix: prefix.to_string(), ..self }
    }

    /// Casts the parameters to this dtype. If it isn't given, they keep their dtype and must all have the same one.
    pub fn dtype(self, dtype: DType) -> Self {
        Self { dtype: Some(dtype), ..self }
    }

    /// Puts the parameters on this device; on the CPU if not given.
    pub fn device(self, device: &Device) -> Self {
        Self { device: device.clone(), ..self }
    }
}
