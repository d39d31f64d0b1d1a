//! One value for each model of a registry.

use std::ops::{Index, IndexMut};

use super::{ModelId, Models};

/// One value for each model of a registry, for example its queue. Indexing with an id of that registry never fails.
#[derive(Clone, Debug)]
pub struct ModelMap<T>(Vec<T>);

impl Models {
    /// Assigns one value to each model, in the order of the models.
    ///
    /// # Panics
    /// Panics if the number of values differs from the number of models.
    #[must_use]
    pub fn map_values<T>(&self, values: impl IntoIterator<Item = T>) -> ModelMap<T> {
        let values: Vec<_> = values.into_iter().collect();
        assert_eq!(values.len(), self.entries.len(), "one value per model");
        ModelMap(values)
    }
}

impl<T> ModelMap<T> {
    /// Returns the values with their models.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (ModelId, &T)> {
        let values = self.0.iter().enumerate();
        values.map(|(index, value)| (ModelId(index), value))
    }

    /// Returns the values, in the order of the models.
    #[must_use]
    pub(crate) fn as_slice(&self) -> &[T] {
        &self.0
    }

    /// Returns mutable references to the values, in the order of the models.
    pub(crate) fn values_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.0.iter_mut()
    }

    /// Converts each value.
    #[must_use]
    pub(crate) fn map<U>(self, mut convert: impl FnMut(ModelId, T) -> U) -> ModelMap<U> {
        let values = self.0.into_iter().enumerate();
        ModelMap(
            values
                .map(|(index, value)| convert(ModelId(index), value))
                .collect(),
        )
    }
}

impl<T> Index<ModelId> for ModelMap<T> {
    type Output = T;

    fn index(&self, id: ModelId) -> &T {
        &self.0[id.0]
    }
}

impl<T> IndexMut<ModelId> for ModelMap<T> {
    fn index_mut(&mut self, id: ModelId) -> &mut T {
        &mut self.0[id.0]
    }
}
