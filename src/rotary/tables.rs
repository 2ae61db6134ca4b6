//! [`Tables`]: cosines and sines that another program has computed.

use candle_core::{DType, Device, Tensor};

use crate::check::{check_device, check_dtype};
use crate::error::{AttentionError, Result};
use crate::memory;
use crate::rotary::positions::Positions;

/// What rows of tables are in an error of memory.
const ROWS: &str = "rows of cos and sin";

/// Cosines and sines of every position, (tables, max_position, dim / 2), where there is a table for each sequence or a
/// single one for all sequences.
#[derive(Clone, Debug)]
pub(super) struct Tables {
    cos: Tensor,
    sin: Tensor,
}

impl Tables {
    /// Tables (max_position, dim / 2) or (batch, max_position, dim / 2), for heads of `head_dim` entries.
    pub(super) fn new(cos: &Tensor, sin: &Tensor, head_dim: usize) -> Result<Self> {
        let shape = cos.dims().to_vec();
        if !matches!(cos.rank(), 2 | 3) {
            let expected = "2 axes (max_position, dim / 2) or 3 (batch, max_position, dim / 2)";
            return Err(AttentionError::Rank { tensor: "cos", expected, shape }.into());
        }
        let pairs = shape[cos.rank() - 1];
        if pairs == 0 || pairs > head_dim / 2 {
            let expected = format!(
                "(max_position, dim / 2) or (batch, max_position, dim / 2) with dim / 2 from 1 to {}, half of head_dim \
                 {head_dim}",
                head_dim / 2
            );
            return Err(AttentionError::Shape { tensor: "cos", expected, shape }.into());
        }
        if sin.dims() != shape {
            let expected = format!("{shape:?}, that of cos");
            return Err(AttentionError::Shape { tensor: "sin", expected, shape: sin.dims().to_vec() }.into());
        }
        check_dtype("cos", cos.dtype())?;
        check_dtype("sin", sin.dtype())?;
        check_device("sin", sin, cos)?;
        memory::check_countable("cos", cos)?;
        memory::check_countable("sin", sin)?;
        let with_batch = |x: &Tensor| if x.rank() == 3 { Ok(x.detach()) } else { x.detach().unsqueeze(0) };
        Ok(Self { cos: with_batch(cos)?, sin: with_batch(sin)? })
    }

    /// The number of rotated entries.
    pub(super) fn dim(&self) -> usize {
        2 * self.cos.dims()[2]
    }

    /// Checks that the tables fit x, whose first axis is the batch.
    pub(super) fn check(&self, x: &Tensor) -> Result<(), AttentionError> {
        check_device("cos", &self.cos, x)?;
        let (batch, tables) = (x.dims()[0], self.count());
        if tables != 1 && tables != batch {
            let expected = format!("(batch, max_position, dim / 2) with batch {batch}, that of the rotary input");
            return Err(AttentionError::Shape { tensor: "cos", expected, shape: self.cos.dims().to_vec() });
        }
        Ok(())
    }

    /// Checks that the tables have a row for each position.
    pub(super) fn check_positions(&self, positions: &[usize]) -> Result<(), AttentionError> {
        let max_position = self.cos.dims()[1];
        match positions.iter().find(|&&position| position >= max_position) {
            None => Ok(()),
            Some(position) => {
                let expected = format!("less than {max_position}, the number of rows of cos and sin");
                Err(AttentionError::Position { expected, got: position.to_string() })
            }
        }
    }

    /// The rows of these positions of sequences of `len` tokens, (lists, 1, len, dim / 2), in the given dtype. There is
    /// a list for each sequence, or a single one for all sequences.
    pub(super) fn rows(&self, positions: &Positions, len: usize, dtype: DType) -> Result<[Tensor; 2]> {
        let (tables, max_position, pairs) = self.cos.dims3()?;
        let flat = positions.flatten(len)?;
        self.check_positions(&flat)?;
        let lists = tables.max(positions.lists());
        // The rows of all tables are numbered one after the other.
        let row = |list: usize, i: usize| {
            let (table, of) = (if tables == 1 { 0 } else { list }, if positions.lists() == 1 { 0 } else { list });
            (table * max_position + flat[of * len + i]) as i64
        };
        // The numbers of the rows, and the rows of cosines and sines, in two dtypes.
        memory::ask(ROWS, &Device::Cpu, memory::bytes(&[lists, len, 2 * pairs + 1], DType::F64).saturating_mul(2))?;
        let rows: Vec<_> = (0..lists).flat_map(|list| (0..len).map(move |i| row(list, i))).collect();
        let rows = Tensor::from_vec(rows, lists * len, self.cos.device())?;
        let select = |x: &Tensor| -> candle_core::Result<Tensor> {
            let x = memory::contiguous(ROWS, x)?.reshape((tables * max_position, pairs))?;
            x.index_select(&rows, 0)?.reshape((lists, 1, len, pairs))?.to_dtype(dtype)
        };
        Ok([select(&self.cos)?, select(&self.sin)?])
    }

    fn count(&self) -> usize {
        self.cos.dims()[0]
    }
}
