//! What self- and cross-attention share: projections, heads, attention, and the way back.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Linear, RmsNorm, VarBuilder};

use crate::attention::attention;
use crate::axes::Axes;
use crate::checkpoint::{self, Header, LayerKind, Layout};
use crate::config::SelfAttentionConfig;
use crate::error::AttentionError;
use crate::file;
