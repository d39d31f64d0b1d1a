//! The GPUs that hold a model. This module must not know the model.

use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::{
    LlamaBackendDevice, LlamaBackendDeviceType, LlamaCppError, list_llama_ggml_backend_devices,
};

use super::options::LlamaOptions;
use crate::runner::LoadError;

/// The GPUs that the options select for a model.
#[derive(Debug)]
pub(super) struct SelectedDevices {
    gpus: Vec<LlamaBackendDevice>,
    /// True if the options name the GPUs. Otherwise llama.cpp chooses among all of them.
    are_named: bool,
}

impl SelectedDevices {
    /// Selects the GPUs that the options name, or all GPUs of this machine that this build supports. Integrated GPUs
    /// are selected only if the machine has no other GPU, or if the options name them.
    ///
    /// # Errors
    /// A name is unknown. The error lists the known names.
    pub(super) fn select(options: &LlamaOptions) -> Result<Self, LoadError> {
        let gpus = list_llama_ggml_backend_devices();
        let mut gpus: Vec<_> = gpus.into_iter().filter(is_gpu).collect();
        if options.devices.is_empty() {
            // llama.cpp chooses in the same way.
            if gpus.iter().any(is_discrete) {
                gpus.retain(is_discrete);
            }
            return Ok(Self {
                gpus,
                are_named: false,
            });
        }
        let find = |name: &String| {
            let known = gpus.iter().find(|gpu| gpu.name == *name).cloned();
            known.ok_or_else(|| unknown_device(name, &gpus))
        };
        let named = options.devices.iter().map(find).collect::<Result<_, _>>()?;
        Ok(Self {
            gpus: named,
            are_named: true,
        })
    }

    /// Returns the placement of the model's layers.
    pub(super) fn layers(&self, options: &LlamaOptions) -> LayerPlacement {
        let indices = self.gpus.iter().map(|gpu| gpu.index).collect();
        let devices = match self.is_cpu_only(options) {
            // Otherwise, llama.cpp would compute large batches on a GPU even if the GPU holds no layer.
            true => Some(Vec::new()),
            false => self.are_named.then_some(indices),
        };
        LayerPlacement {
            devices,
            gpu_layers: options.gpu_layers.unwrap_or(u32::MAX),
        }
    }

    /// Returns true if no GPU holds a layer.
    pub(super) fn is_cpu_only(&self, options: &LlamaOptions) -> bool {
        self.gpus.is_empty() || options.gpu_layers == Some(0)
    }

    /// Describes the devices that compute the model, for the log and `/readyz`.
    pub(super) fn describe(&self, options: &LlamaOptions) -> String {
        let threads = options.threads;
        let threads_batch = options.threads_batch.unwrap_or(threads);
        let noun = if threads == 1 { "thread" } else { "threads" };
        let cpu = if threads_batch == threads {
            format!("CPU, {threads} {noun}")
        } else {
            format!("CPU, {threads} {noun}, {threads_batch} for prompts")
        };
        if self.is_cpu_only(options) {
            return cpu;
        }
        let gpus: Vec<_> = self
            .gpus
            .iter()
            .map(|gpu| format!("{} ({})", gpu.name, gpu.description))
            .collect();
        let gpus = gpus.join(" + ");
        match options.gpu_layers {
            None => format!("{gpus}, all layers"),
            Some(layers) => format!("{gpus}, {layers} layers; {cpu}"),
        }
    }
}

/// The devices that hold a model's layers, for llama.cpp.
#[derive(Debug)]
pub(super) struct LayerPlacement {
    /// Indices of the GPUs. `None` lets llama.cpp choose.
    devices: Option<Vec<usize>>,
    gpu_layers: u32,
}

impl LayerPlacement {
    /// Returns llama.cpp's parameters for loading a model.
    ///
    /// # Errors
    /// There are more GPUs than llama.cpp supports.
    pub(super) fn model_params(&self) -> Result<LlamaModelParams, LlamaCppError> {
        let params = LlamaModelParams::default().with_n_gpu_layers(self.gpu_layers);
        match &self.devices {
            Some(devices) => params.with_devices(devices),
            None => Ok(params),
        }
    }
}

fn is_gpu(device: &LlamaBackendDevice) -> bool {
    matches!(
        device.device_type,
        LlamaBackendDeviceType::Gpu | LlamaBackendDeviceType::IntegratedGpu
    )
}

fn is_discrete(device: &LlamaBackendDevice) -> bool {
    device.device_type == LlamaBackendDeviceType::Gpu
}

fn unknown_device(name: &str, gpus: &[LlamaBackendDevice]) -> LoadError {
    let names: Vec<_> = gpus.iter().map(|gpu| &*gpu.name).collect();
    LoadError(if names.is_empty() {
        format!(
            "`devices` has '{name}', but this build supports no GPU of this machine; leave `devices` out, or build Tokenway \
             with the feature of another GPU: cuda, metal, rocm or vulkan"
        )
    } else {
        format!(
            "`devices`: '{name}' is unknown; this machine has {}",
            names.join(", ")
        )
    })
}
