//! Rows of a trained table by their numbers: the first layer of a language model.

use attention_kernels::embedding as kernels;
use candle_core::{DType, Result as CandleResult, Shape, Tensor};
use candle_nn::{Init, VarBuilder};

use crate::block::op::{Dtype, Function, Gradient, apply};
use crate::check::{check_device, check_dtype, compute_dtype};
use crate::error::{AttentionError, Result};
use crate::memory;

/// A table with a row for each token.
///
/// Unlike candle's, its gradient is the same for any number of threads, half types are summed in f32, and an id that is no row is
/// an error that names it.
///
/// # Examples
///
/// ```
/// use candle_attention::block::Embedding;
/// use candle_core::{Device, Tensor, Var};
///
/// let weight = Var::new(&[[0f32, 1.0], [10.0, 11.0], [20.0, 21.0]], &Device::Cpu)?;
/// let embedding = Embedding::new(weight.as_tensor().clone())?;
/// let x = embedding.forward(&Tensor::new(&[2u32, 0, 2], &Device::Cpu)?)?;
/// assert_eq!(x.to_vec2::<f32>()?, [[20.0, 21.0], [0.0, 1.0], [20.0, 21.0]]);
/// let gradient = x.sum_all()?.backward()?.remove(&weight).unwrap();
/// assert_eq!(gradient.to_vec2::<f32>()?, [[1.0, 1.0], [0.0, 0.0], [2.0, 2.0]]);
/// # Ok::<(), candle_attention::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Embedding {
    weight: Tensor,
}

/// An [`Embedding`] whose weight (vocabulary, dim) is the builder's tensor `weight`, drawn from the standard normal distribution
/// if it is new, as in PyTorch.
///
/// # Errors
///
/// What the builder says; a dtype that isn't a float.
pub fn embedding(vocabulary: usize, dim: usize, vb: VarBuilder) -> Result<Embedding> {
    Embedding::new(vb.get_with_hints((vocabulary, dim), "weight", Init::Randn { mean: 0.0, stdev: 1.0 })?)
}

impl Embedding {
    /// An embedding with this weight (vocabulary, dim).
    ///
    /// # Errors
    ///
    /// A weight of another rank than 2, or of a dtype that isn't a float.
    pub fn new(weight: Tensor) -> Result<Self> {
        check_dtype("weight", weight.dtype())?;
        if weight.rank() != 2 {
            let (expected, shape) = ("2 axes (vocabulary, dim)", weight.dims().to_vec());
            return Err(AttentionError::Rank { tensor: "weight", expected, shape }.into());
        }
        Ok(Self { weight })
    }

    /// The weight (vocabulary, dim).
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The rows `ids` of the weight.
    ///
    /// # Shapes
    ///
    /// ids (...) in u8, u32 or i64; the result is (..., dim).
    ///
    /// # Errors
    ///
    /// Ids of another dtype, on another device, or that are no rows; too little memory.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let (vocabulary, dim) = self.weight.dims2()?;
        check_device("ids", ids, &self.weight)?;
        let shape = [ids.dims(), &[dim]].concat();
        memory::ask("embedded tokens", ids.device(), memory::bytes(&shape, self.weight.dtype()))?;
        let numbers = whole_numbers("ids", ids)?;
        let range = |id: i64| (0..vocabulary as i64).contains(&id);
        if let Some((position, &got)) = numbers.iter().enumerate().find(|(_, id)| !range(**id)) {
            let expected = format!("an id in 0..{vocabulary}, the rows of the weight");
            return Err(AttentionError::Id { tensor: "ids", expected, got, position }.into());
        }
        if self.weight.device().is_cpu() {
            let ids = attention_kernels::collected("ids", numbers.iter().map(|id| *id as u32))?;
            return Ok(apply(Rows { ids, shape: shape.into() }, [&self.weight])?);
        }
        // candle adds up the gradient of a half type in that type.
        let wide = compute_dtype(self.weight.dtype());
        let ids = Tensor::from_vec(numbers, ids.elem_count(), ids.device())?.to_dtype(DType::U32)?;
        let rows = self.weight.to_dtype(wide)?.index_select(&ids, 0)?;
        Ok(rows.to_dtype(self.weight.dtype())?.reshape(shape)?)
    }
}

/// The numbers of a tensor in u8, u32 or i64, in row-major order.
pub(crate) fn whole_numbers(tensor: &'static str, x: &Tensor) -> Result<Vec<i64>> {
    if !matches!(x.dtype(), DType::U8 | DType::U32 | DType::I64) {
        return Err(AttentionError::DType { tensor, expected: "U8, U32 or I64".into(), got: x.dtype() }.into());
    }
    memory::check_countable(tensor, x)?;
    memory::ask_for(tensor, 3, x, DType::I64)?;
    let x = crate::empty::readable(x)?.flatten_all()?.to_dtype(DType::I64)?;
    Ok(x.to_vec1()?)
}

/// The operation on the CPU.
struct Rows {
    ids: Vec<u32>,
    shape: Shape,
}

impl Function<1> for Rows {
    const NAME: &'static str = "embedding";

    fn forward<E: Dtype>(&self, [weight]: [&[E]; 1], [dims]: [&[usize]; 1]) -> CandleResult<Vec<E>> {
        Ok(kernels::embedding(weight, [dims[0], dims[1]], &self.ids).map_err(AttentionError::from)?)
    }

    fn backward<E: Dtype>(
        &self,
        _: [&[E]; 1],
        [dims]: [&[usize]; 1],
        grad: &[E],
        _: [bool; 1],
    ) -> CandleResult<[Option<Gradient<E>>; 1]> {
        let gradient =
            kernels::embedding_gradient(&self.ids, grad, [dims[0], dims[1]]).map_err(AttentionError::from)?;
        Ok([Some(Gradient::Numbers(gradient))])
    }

    fn shape(&self, _: [&[usize]; 1]) -> Shape {
        self.shape.clone()
    }
}
