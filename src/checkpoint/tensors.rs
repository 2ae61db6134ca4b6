//! [`TensorFile`]: a safetensors file whose tensors are read as they are asked for, since it may be larger than memory.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Result, Tensor};
use safetensors::tensor::{Metadata, TensorInfo};

use crate::error::AttentionError;
use crate::file::file_error;

/// safetensors' own limit for a header.
const LARGEST_HEADER: u64 = 100_000_000;

/// An open file. It is read without a memory map, which would need unsafe code, and stays what it is when another file
/// takes its name.
pub(super) struct TensorFile {
    path: PathBuf,
    file: Mutex<File>,
    /// Where the tensors' data begins.
    start: u64,
    metadata: Metadata,
}

impl TensorFile {
    /// Reads the header, and checks that the file holds what it says.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let io_error = |cause: &std::io::Error| file_error(path, "read", cause);
        let mut file = File::open(path).map_err(|cause| io_error(&cause))?;
        let bytes = file.metadata().map_err(|cause| io_error(&cause))?.len();
        let no_safetensors = |why: String| {
            let got = format!("{bytes} bytes that aren't one: {why}");
            candle_core::Error::from(AttentionError::Checkpoint { expected: "a safetensors file".into(), got })
                .with_path(path)
        };
        let mut len = [0; 8];
        match bytes {
            8.. => file.read_exact(&mut len).map_err(|cause| io_error(&cause))?,
            _ => return Err(no_safetensors("no room for the length of a header".into())),
        }
        let len = u64::from_le_bytes(len);
        // Nothing is allocated that the header merely claims.
        if len > (bytes - 8).min(LARGEST_HEADER) {
            return Err(no_safetensors(format!("a header of {len} bytes")));
        }
        let mut header = vec![0; len as usize];
        file.read_exact(&mut header).map_err(|cause| io_error(&cause))?;
        let metadata: Metadata = serde_json::from_slice(&header).map_err(|error| no_safetensors(error.to_string()))?;
        let (data, start) = (metadata.data_len() as u64, 8 + len);
        if data != bytes - start {
            return Err(no_safetensors(format!("{data} bytes of data announced, {} there", bytes - start)));
        }
        Ok(Self { path: path.to_path_buf(), file: Mutex::new(file), start, metadata })
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    pub(super) fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.metadata.info(name)
    }

    /// The tensor of this name, on the CPU, in the dtype that it has in the file.
    pub(super) fn read(&self, name: &str) -> Result<Tensor> {
        let missing = || candle_core::Error::CannotFindTensor { path: name.to_string() }.with_path(&self.path);
        let info = self.info(name).ok_or_else(missing)?;
        let (from, to) = info.data_offsets;
        let mut data = Vec::new();
        let no_memory = |_| AttentionError::Memory { what: "tensor of a checkpoint", bytes: to - from };
        data.try_reserve_exact(to - from).map_err(no_memory)?;
        data.resize(to - from, 0);
        {
            // A read that panicked elsewhere leaves nothing behind but a place, which is set anew.
            let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
            file.seek(SeekFrom::Start(self.start + from as u64))
                .and_then(|_| file.read_exact(&mut data))
                .map_err(|cause| file_error(&self.path, "read", &cause))?;
        }
        let dtype = DType::try_from(info.dtype).map_err(|error| error.with_path(&self.path))?;
        Tensor::from_raw_buffer(&data, dtype, &info.shape, &Device::Cpu)
    }
}
