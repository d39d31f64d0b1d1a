//! Tables of the settings file that contain tables, deserialised with all of their errors. Each error has the name of
//! its setting, such as `route[1].targets[2].engine`, and its position in the file.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::mem::replace;

use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, Deserializer, MapAccess, Visitor};
use toml::Spanned;
use toml::de::{DeArray, DeTable, DeValue};

use super::error::{FileError, Position};
use super::file::SettingLocation;
use super::settings::use_toml_type_names;

/// Field under which the `toml` crate passes a date or a time to a type that accepts tables.
const DATETIME_FIELD: &str = "`$__toml_private_datetime`";

/// A table inside another one. A derived struct alone would also accept a list, whose items would be the values of the
/// fields in their order.
#[derive(Debug, Default)]
pub(super) struct Nested<T>(pub(super) T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Nested<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(TableVisitor(PhantomData))
    }
}

struct TableVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for TableVisitor<T> {
    type Value = Nested<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map)).map(Nested)
    }
}

/// The name and the position of each key and of each list item in some tables.
#[derive(Debug, Default)]
pub(super) struct Locations {
    /// Locations by the offset at which a key, its value or an item starts.
    by_offset: BTreeMap<usize, SettingLocation>,
}

impl Locations {
    /// Returns the location of a deserialised value.
    pub(super) fn of<T>(&self, value: &Spanned<T>) -> &SettingLocation {
        self.at(value.span().start)
    }

    fn at(&self, offset: usize) -> &SettingLocation {
        let before = self.by_offset.range(..=offset).next_back();
        let (_, location) = before
            .or_else(|| self.by_offset.first_key_value())
            .expect("a value or an error is in one of the tables");
        location
    }

    fn add_table(&mut self, file: &SourceFile<'_>, table: &DeTable<'_>, prefix: &str) {
        for (key, value) in table {
            let name = format!("{prefix}{}", key.get_ref());
            let location = file.location(key.span().start, &name);
            self.by_offset.insert(key.span().start, location.clone());
            // The items of a list may start where the list itself starts, so they are added after it.
            self.by_offset.insert(value.span().start, location);
            self.add_inside(file, value.get_ref(), &name);
        }
    }

    fn add_inside(&mut self, file: &SourceFile<'_>, value: &DeValue<'_>, name: &str) {
        if let Some(table) = value.as_table() {
            self.add_table(file, table, &format!("{name}."));
        }
        let items = value.as_array().into_iter().flat_map(|items| items.iter());
        for (number, item) in (1..).zip(items) {
            let name = format!("{name}[{number}]");
            let offset = item.span().start;
            self.by_offset.insert(offset, file.location(offset, &name));
            self.add_inside(file, item.get_ref(), &name);
        }
    }
}

/// A settings file, for error messages.
pub(super) struct SourceFile<'a> {
    pub(super) path: &'a str,
    pub(super) text: &'a str,
}

impl SourceFile<'_> {
    /// Returns the location of the setting `name`, whose key starts at `offset`.
    pub(super) fn location(&self, offset: usize, name: &str) -> SettingLocation {
        SettingLocation {
            path: self.path.to_owned(),
            position: Position::at(self.text, offset),
            name: name.to_owned(),
        }
    }
}

/// Tables that were deserialised, with the errors of the values that were left out.
#[derive(Debug, Default)]
pub(super) struct DeserialisedTables<T> {
    pub(super) values: T,
    pub(super) locations: Locations,
    pub(super) errors: Vec<FileError>,
}

/// Deserialises the tables. All fields of `T` and of the structs in it must be optional, because a value with an error
/// is left out. `forbidden` has unknown keys that deserve an explanation: (key, explanation).
pub(super) fn deserialise<T: DeserializeOwned + Default>(
    file: &SourceFile<'_>,
    mut tables: DeTable<'_>,
    forbidden: &[(&str, &str)],
) -> DeserialisedTables<T> {
    let mut locations = Locations::default();
    locations.add_table(file, &tables, "");
    let mut errors = Vec::new();
    loop {
        let document = Spanned::new(0..file.text.len(), tables.clone());
        let error = match T::deserialize(toml::de::Deserializer::from(document)) {
            Ok(values) => {
                return DeserialisedTables {
                    values,
                    locations,
                    errors,
                };
            }
            Err(error) => error,
        };
        // toml reports the first error only, so the value with the error is removed for the next attempt.
        let offset = error.span().map_or(0, |span| span.start);
        let location = locations.at(offset);
        let problem = describe(&location.name, error.message(), forbidden);
        errors.push(location.error(problem));
        if !remove_from_table(&mut tables, offset) {
            tables.clear();
        }
    }
}

/// Removes the innermost key or list item that starts at `offset`, or whose value does.
fn remove_from_table(table: &mut DeTable<'_>, offset: usize) -> bool {
    let mut values = table.iter_mut().map(|(_, value)| value.get_mut());
    if values.any(|value| remove_inside(value, offset)) {
        return true;
    }
    let mut entries = table.iter();
    let found =
        entries.find(|(key, value)| [key.span().start, value.span().start].contains(&offset));
    let found = found.map(|(key, _)| key.get_ref().to_string());
    found.is_some_and(|key| table.remove(key.as_str()).is_some())
}

fn remove_inside(value: &mut DeValue<'_>, offset: usize) -> bool {
    match value {
        DeValue::Table(table) => remove_from_table(table, offset),
        DeValue::Array(items) => {
            let mut inside = items.iter_mut().map(Spanned::get_mut);
            if inside.any(|item| remove_inside(item, offset)) {
                return true;
            }
            let before = items.len();
            let kept = replace(items, DeArray::new()).into_iter();
            *items = kept.filter(|item| item.span().start != offset).collect();
            items.len() < before
        }
        DeValue::String(_)
        | DeValue::Integer(_)
        | DeValue::Float(_)
        | DeValue::Boolean(_)
        | DeValue::Datetime(_) => false,
    }
}

/// Describes a problem with the setting `name`. `message` is that of the `toml` crate.
fn describe(name: &str, message: &str, forbidden: &[(&str, &str)]) -> String {
    if message.contains(DATETIME_FIELD) {
        return format!("{name}: invalid type: date or time, expected a table");
    }
    if !message.starts_with("unknown field `") {
        return format!("{name}: {}", use_toml_type_names(message));
    }
    let key = name.rsplit('.').next().unwrap_or(name);
    if let Some((_, explanation)) = forbidden.iter().find(|(forbidden, _)| *forbidden == key) {
        return format!("the key '{name}' is not allowed: {explanation}");
    }
    // serde lists the known fields in backticks.
    let known = message.rsplit_once("expected ").unwrap_or_default().1;
    let known: Vec<_> = known.split('`').skip(1).step_by(2).collect();
    format!(
        "the key '{name}' is unknown; known keys are {}",
        known.join(", ")
    )
}
