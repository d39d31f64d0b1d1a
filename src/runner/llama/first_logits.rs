//! The logits from which sequences sampled their first token, and the buffers in which they are kept. This module must
//! not know sequences or llama.cpp.

use std::sync::Arc;

/// The logits from which a sequence sampled its first token. A sequence that starts with the same tokens can sample
/// from them too, so it needs to compute no row.
#[derive(Clone, Debug)]
pub(super) struct FirstLogits {
    /// Number of tokens before the sampled one.
    pub(super) tokens: usize,
    pub(super) logits: Arc<[f32]>,
}

/// Buffers for first logits. A buffer is used again after its logits are dropped. Otherwise each prompt would allocate
/// hundreds of KiB that live for as long as its computed tokens, which leaves holes in the heap.
pub(super) struct LogitsBuffers {
    /// All buffers. A buffer is free if no other `Arc` refers to it.
    buffers: Vec<Arc<[f32]>>,
    max_free: usize,
}

impl LogitsBuffers {
    /// Creates no buffers yet. At most `max_free` free buffers are kept.
    pub(super) fn new(max_free: usize) -> Self {
        Self {
            buffers: Vec::new(),
            max_free,
        }
    }

    /// Copies logits into a free buffer, or into a new one if none is free. All calls must pass equally many logits.
    pub(super) fn copy(&mut self, logits: &[f32]) -> Arc<[f32]> {
        self.drop_surplus();
        for buffer in &mut self.buffers {
            if let Some(free) = Arc::get_mut(buffer) {
                free.copy_from_slice(logits);
                return Arc::clone(buffer);
            }
        }
        let buffer: Arc<[f32]> = logits.into();
        self.buffers.push(Arc::clone(&buffer));
        buffer
    }

    fn drop_surplus(&mut self) {
        let mut free = 0;
        self.buffers.retain(|buffer| {
            free += usize::from(Arc::strong_count(buffer) == 1);
            Arc::strong_count(buffer) > 1 || free <= self.max_free
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_used_again_after_its_logits_are_dropped() {
        let mut buffers = LogitsBuffers::new(2);
        let first = buffers.copy(&[1.0, 2.0]);
        let address = first.as_ptr();
        let second = buffers.copy(&[3.0, 4.0]);
        assert_ne!(second.as_ptr(), address);
        assert_eq!(*first, [1.0, 2.0], "it is in use");

        drop(first);
        let third = buffers.copy(&[5.0, 6.0]);
        assert_eq!(third.as_ptr(), address);
        assert_eq!((&*third, &*second), (&[5.0, 6.0][..], &[3.0, 4.0][..]));
    }

    #[test]
    fn only_a_limited_number_of_free_buffers_is_kept() {
        let mut buffers = LogitsBuffers::new(2);
        let used = buffers.copy(&[0.0]);
        drop([1.0, 2.0, 3.0, 4.0].map(|logit| buffers.copy(&[logit])));
        let next = buffers.copy(&[5.0]);
        assert_eq!(buffers.buffers.len(), 3, "two in use, and one free");
        assert_eq!((&*used, &*next), (&[0.0][..], &[5.0][..]));
    }
}
