//! [`Core`] as a layer of projections, which adapters and quantised weights change.

use candle_core::Tensor;

use crate::error::Result;
use crate::layer::bias_kv::BiasKv;
use crate::layer::core::Core;
use crate::projection::{Change, Projection, Projections};

impl Projections for Core {
    fn projections(&self) -> Vec<(String, &Projection)> {
        let all = [&self.q_proj, &self.k_proj, &self.v_proj].into_iter().chain(&self.o_proj);
        all.map(|projection| (projection.name().to_string(), projection)).collect()
    }

    fn map_projections(&self, change: &mut Change) -> Result<Self> {
        self.shared.as_ref().map_or(Ok(()), |shared| shared.ranks.refuse())?;
        let mut changed = |projection: &Projection| change(projection.name(), projection);
        let (q_proj, k_proj) = (changed(&self.q_proj)?, changed(&self.k_proj)?);
        let (v_proj, o_proj) = (changed(&self.v_proj)?, self.o_proj.as_ref().map(changed).transpose()?);
        let mut layer = self.clone();
        (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj) = (q_proj, k_proj, v_proj, o_proj);
        Ok(layer)
    }

    fn frozen(&self) -> Self {
        let detached = |pair: &Option<(Tensor, Tensor)>| pair.as_ref().map(|(a, b)| (a.detach(), b.detach()));
        let mut layer = self.clone();
        for projection in [&mut layer.q_proj, &mut layer.k_proj, &mut layer.v_proj].into_iter().chain(&mut layer.o_proj)
        {
            *projection = projection.frozen();
        }
        layer.qk_norm = detached(&self.qk_norm);
        layer.sinks = self.sinks.as_ref().map(Tensor::detach);
        layer.bias_kv = BiasKv { learned: detached(&self.bias_kv.learned), zeros: self.bias_kv.zeros };
        layer
    }
}
