//! [`TensorFile`]: a safetensors file whose tensors are read one by one, since the file may be larger than memory.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use attention_files::FileError;
use attention_kernels::filled;
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Metadata, TensorInfo};

use crate::checkpoint::header::check_header;
use crate::error::{AttentionError, Error, Result};
use crate::memory;

/// The limit of the safetensors crate for the length of a header.
const MAX_HEADER_LEN: u64 = 100_000_000;

/// An open file. It is read without a memory map. If another file replaces it under the
/// same name, the open file keeps its contents.
pub(super) struct TensorFile {
    path: PathBuf,
    file: Mutex<File>,
    /// Where the tensors' data begins.
    start: u64,
    metadata: Metadata,
}

impl TensorFile {
    /// Reads the header, and checks that the file holds as much data as the header says.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let io_error = |cause: std::io::Error| FileError::read(path, &cause);
        let mut file = File::open(path).map_err(io_error)?;
        let bytes = file.metadata().map_err(io_error)?.len();
        let not_safetensors = |why: String| {
            let got = format!("{bytes} bytes that aren't one: {why}");
            let path = Some(path.to_path_buf());
            Error::from(AttentionError::Checkpoint { path, expected: "a safetensors file".into(), got })
        };
        let mut len = [0; 8];
        match bytes {
            8.. => file.read_exact(&mut len).map_err(io_error)?,
            _ => return Err(not_safetensors("no room for the length of a header".into())),
        }
        let len = u64::from_le_bytes(len);
        // The length is checked before memory is allocated, since a file can claim any length.
        if len > (bytes - 8).min(MAX_HEADER_LEN) {
            return Err(not_safetensors(format!("a header of {len} bytes")));
        }
        let mut header = filled("header of a checkpoint", len as usize, 0)?;
        file.read_exact(&mut header).map_err(io_error)?;
        check_header(&header, bytes).map_err(not_safetensors)?;
        let metadata: Metadata = serde_json::from_slice(&header).map_err(|error| not_safetensors(error.to_string()))?;
        let (data, start) = (metadata.data_len() as u64, 8 + len);
        if data != bytes - start {
            return Err(not_safetensors(format!("a header for {data} bytes of data, but {} bytes", bytes - start)));
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
        // The bytes, and the tensor made of them.
        memory::ask("tensor of a checkpoint", &Device::Cpu, (to - from).saturating_mul(2))?;
        let mut data = filled("tensor of a checkpoint", to - from, 0)?;
        {
            // A read that panicked can have changed only the position in the file, which is set here.
            let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
            file.seek(SeekFrom::Start(self.start + from as u64))
                .and_then(|_| file.read_exact(&mut data))
                .map_err(|cause| FileError::read(&self.path, &cause))?;
        }
        let dtype = DType::try_from(info.dtype).map_err(|error| error.with_path(&self.path))?;
        Ok(Tensor::from_raw_buffer(&data, dtype, &info.shape, &Device::Cpu)?)
    }
}
