//! Who stands in functions of the guest's kernel, as it goes over the control socket, and what a client can ask for.

use patcher::addr::Gva;
use serde::{Deserialize, Serialize};

use crate::api::percent::{decoded, encoded};

/// Most functions of one request.
pub const MOST_FUNCTIONS: usize = 64;

/// Which functions are meant: the query of `GET /tasks/inside`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InsideQuery {
    /// Their names, as a plan writes them.
    pub functions: Vec<String>,
}

impl InsideQuery {
    /// Reads a query.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(query: &str) -> Result<Self, String> {
        let mut functions = Vec::new();
        for part in query.split('&').filter(|part| !part.is_empty()) {
            let name = part.strip_prefix("function=").and_then(decoded).filter(|name| !name.is_empty());
            functions.push(name.ok_or_else(|| {
                format!(
                    "?{part} does not go with /tasks/inside: there is function=NAME, once or several times"
                )
            })?);
        }
        match functions.len() {
            0 => Err("/tasks/inside needs ?function=NAME".to_owned()),
            count if count > MOST_FUNCTIONS => {
                Err(format!("{count} functions are more than {MOST_FUNCTIONS}: ask in parts"))
            }
            _ => Ok(Self { functions }),
        }
    }

    /// The path with the query.
    #[must_use]
    pub fn uri(&self) -> String {
        let mut uri = "/tasks/inside".to_owned();
        for (index, name) in self.functions.iter().enumerate() {
            uri += if index == 0 { "?function=" } else { "&function=" };
            uri += &encoded(name);
        }
        uri
    }
}

/// `GET /tasks/inside`: the state at one moment, at which all vCPUs were held.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Inside {
    /// The functions, and the pieces of them that lie elsewhere.
    pub functions: Vec<InsideFunction>,
    /// Who stands in them, or may: a word of its stack, or its next instruction, is an address of them.
    pub tasks: Vec<InsideTask>,
    /// How many tasks the guest has.
    pub tasks_looked_at: usize,
    /// How many of them were looked at once more while all vCPUs were held, because they had run meanwhile.
    pub looked_at_again: usize,
    /// How often the vCPUs were held before there was a moment at which it could be told.
    pub attempts: u32,
    /// How long they were held in the end, in microseconds.
    pub held_us: u64,
}

/// A function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InsideFunction {
    /// Its name, as it was asked for.
    pub name: String,
    /// Where it begins.
    pub start: Gva,
    /// Behind it.
    pub end: Gva,
    /// Its `.cold` and `.part` pieces.
    pub pieces: usize,
}

/// A task that stands inside, or may.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InsideTask {
    /// The number of the thread; 0 for the idle task of a CPU.
    pub pid: u32,
    /// Its name.
    pub comm: String,
    /// What tells it: an address on its stack, or where it goes on.
    pub address: Gva,
    /// The same as `function+0xoffset`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub symbol: Option<String>,
    /// What that address is.
    pub why: InsideWhy,
}

/// What an address on a stack is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InsideWhy {
    /// An address in one of the functions, or in a piece of one.
    Function,
    /// An address of a copy of an instruction that has a kprobe: it may be one of these functions'.
    Kprobe,
    /// An address within a tracer's trampoline: it may return into one of these functions.
    Tracer,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_read_as_it_was_written() {
        for functions in [vec!["do_syslog"], vec!["kvm:a b&c=%\u{fc}", "f,2"]] {
            let asked = InsideQuery { functions: functions.into_iter().map(str::to_owned).collect() };
            let uri = asked.uri();
            assert!(uri.parse::<hyper::Uri>().is_ok(), "{uri}");
            let (path, query) = uri.split_once('?').expect("a query");
            assert_eq!((path, InsideQuery::parse(query)), ("/tasks/inside", Ok(asked)));
        }
        for wrong in ["function=", "function", "function=%4", "name=f"] {
            assert!(InsideQuery::parse(wrong).is_err_and(|why| why.contains(wrong)), "{wrong}");
        }
        assert!(InsideQuery::parse("").is_err_and(|why| why.contains("function=NAME")));
        let many = vec!["function=f"; MOST_FUNCTIONS + 1].join("&");
        assert!(InsideQuery::parse(&many).is_err_and(|why| why.contains("65 functions")));
    }
}
