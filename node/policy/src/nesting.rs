//! A look at policy and schema text before any parser of the engine sees it.
//!
//! Parsers and validators recurse. A few kilobytes of opening brackets, or of `&&`, would
//! otherwise decide how much stack a node needs. This scanner is not recursive, knows strings and
//! comments, splits a policy file into its statements and bounds the depth of each one's tree.

use crate::limits::{EXPRESSION_DEPTH_MAX, NESTING_MAX};

/// One statement of a policy file, with everything that stands before it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Statement<'a> {
    /// The text from the end of the previous statement to this one's semicolon.
    pub(crate) text: &'a str,
    /// Line of the statement's first token, from 1.
    pub(crate) line: usize,
}

/// A policy file taken apart. The parts put together are the file, byte for byte.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Statements<'a> {
    pub(crate) statements: Vec<Statement<'a>>,
    /// What follows the last semicolon: blanks and comments, or a mistake for the parser to name.
    pub(crate) rest: &'a str,
    /// Line of the first token of the rest.
    pub(crate) rest_line: usize,
}

/// Text that is nested too deeply.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct TooDeep {
    pub(crate) line: usize,
    pub(crate) message: String,
}

/// One open bracket, and an upper bound of the height of the tree inside it.
///
/// An element is what stands between commas, an operand what stands between logical operators. An
/// operand is as high as it has tokens, plus its highest bracket; an element as its highest operand,
/// plus one for each logical operator, because those chain into a list-shaped tree.
#[derive(Default)]
struct Level {
    tokens: usize,
    brackets: usize,
    chain: usize,
    operands: usize,
    elements: usize,
}

impl Level {
    fn height(&self) -> usize {
        self.elements
            .max(self.chain + self.operands.max(self.tokens + self.brackets))
    }

    fn end_operand(&mut self) {
        self.operands = self.operands.max(self.tokens + self.brackets);
        self.tokens = 0;
        self.brackets = 0;
        self.chain += 1;
    }

    fn end_element(&mut self) {
        *self = Self {
            elements: self.height(),
            ..Self::default()
        };
    }
}

/// Splits a policy file at its semicolons and bounds the depth of every statement.
pub(crate) fn split_policies(text: &str) -> Result<Statements<'_>, TooDeep> {
    let mut statements = Vec::new();
    let mut begin = 0;
    let mut line_of_first = None;
    let mut line = 1;
    scan(text, false, |token| match token {
        Token::Line => line += 1,
        Token::Code => {
            line_of_first.get_or_insert(line);
        }
        Token::End(end) => {
            let first = line_of_first.take().unwrap_or(line);
            if let Some(part) = text.get(begin..end) {
                statements.push(Statement {
                    text: part,
                    line: first,
                });
            }
            begin = end;
        }
    })?;
    let rest_line = line_of_first.unwrap_or(line);
    Ok(Statements {
        statements,
        rest: text.get(begin..).unwrap_or_default(),
        rest_line,
    })
}

/// Bounds the depth of a schema, where angle brackets nest as well.
pub(crate) fn check_schema(text: &str) -> Result<(), TooDeep> {
    scan(text, true, |_| ())
}

enum Token {
    /// A line ended.
    Line,
    /// Something that is neither blank nor comment.
    Code,
    /// A statement ended before this byte offset.
    End(usize),
}

/// Walks over the text once.
fn scan(text: &str, angles: bool, mut emit: impl FnMut(Token)) -> Result<(), TooDeep> {
    let mut levels = Levels(vec![Level::default()]);
    let mut line = 1;
    let mut in_word = false;
    let mut characters = text.char_indices().peekable();
    while let Some((at, character)) = characters.next() {
        let continues_word = std::mem::take(&mut in_word);
        if character == '\n' {
            line += 1;
            emit(Token::Line);
            continue;
        }
        if character.is_whitespace() {
            continue;
        }
        if character == '/' && characters.peek().is_some_and(|(_, next)| *next == '/') {
            // The engine ends a comment at either kind of line end; so must this.
            while characters
                .next_if(|(_, next)| !matches!(next, '\n' | '\r'))
                .is_some()
            {}
            continue;
        }
        emit(Token::Code);
        match character {
            '"' => {
                while let Some((_, inner)) = characters.next() {
                    match inner {
                        '"' => break,
                        '\n' => {
                            line += 1;
                            emit(Token::Line);
                        }
                        // The escaped character, unless it ends a line that must be counted.
                        '\\' => _ = characters.next_if(|(_, next)| *next != '\n'),
                        _ => {}
                    }
                }
                levels.top(line, |level| level.tokens += 1)?;
            }
            '[' => {
                // `a["b"]["c"]`: each index is one step higher than what stands before it.
                levels.top(line, |level| {
                    level.tokens += usize::from(level.tokens + level.brackets > 0);
                })?;
                levels.open(line)?;
            }
            '(' | '{' => levels.open(line)?,
            '<' if angles => levels.open(line)?,
            ')' | ']' | '}' => levels.close(line)?,
            '>' if angles => levels.close(line)?,
            ',' => levels.top(line, Level::end_element)?,
            '&' | '|' if characters.next_if(|(_, next)| *next == character).is_some() => {
                levels.top(line, Level::end_operand)?;
            }
            ';' if levels.0.len() == 1 => {
                emit(Token::End(at + 1));
                levels = Levels(vec![Level::default()]);
            }
            _ if character.is_alphanumeric() || character == '_' => {
                in_word = true;
                if !continues_word {
                    // `if` chains to the right without brackets: its own level, kept until the
                    // element ends. Every other word counts as an operator, which overstates.
                    let is_if = text.get(at..).is_some_and(|rest| rest.starts_with("if"));
                    levels.top(line, |level| {
                        level.tokens += 1;
                        level.chain += usize::from(is_if);
                    })?;
                }
            }
            _ => levels.top(line, |level| level.tokens += 1)?,
        }
    }
    Ok(())
}

/// The open brackets, the statement itself at the bottom.
struct Levels(Vec<Level>);

impl Levels {
    fn open(&mut self, line: usize) -> Result<(), TooDeep> {
        if self.0.len() > NESTING_MAX {
            return Err(TooDeep {
                line,
                message: format!("brackets nest deeper than {NESTING_MAX}: split the expression"),
            });
        }
        self.0.push(Level::default());
        Ok(())
    }

    fn close(&mut self, line: usize) -> Result<(), TooDeep> {
        // A bracket that was never opened is the parser's to report.
        if self.0.len() > 1
            && let Some(closed) = self.0.pop()
        {
            let height = closed.height() + 1;
            self.top(line, |level| level.brackets = level.brackets.max(height))?;
        }
        Ok(())
    }

    fn top(&mut self, line: usize, change: impl FnOnce(&mut Level)) -> Result<(), TooDeep> {
        let Some(level) = self.0.last_mut() else {
            return Ok(());
        };
        change(level);
        if level.height() > EXPRESSION_DEPTH_MAX {
            return Err(TooDeep {
                line,
                message: format!(
                    "an expression is longer or deeper than {EXPRESSION_DEPTH_MAX} operators: \
                     split the policy, or use a set"
                ),
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<usize> {
        split_policies(text)
            .unwrap()
            .statements
            .iter()
            .map(|statement| statement.line)
            .collect()
    }

    #[test]
    fn statements_are_split_outside_strings_and_comments() {
        let text = "// a; b\npermit(principal, action, resource);\n\n@id(\"x;\\\"y\")\nforbid(p);\n// end;";
        let parts = split_policies(text).unwrap();
        assert_eq!(lines(text), [2, 4]);
        let joined: String = parts
            .statements
            .iter()
            .map(|statement| statement.text)
            .collect();
        assert_eq!(joined + parts.rest, text);
        assert_eq!(parts.rest, "\n// end;");
        assert_eq!(split_policies("").unwrap().statements, []);
    }

    #[test]
    fn a_comment_ends_at_a_bare_carriage_return() {
        // The engine's lexer does it so. A scanner that read on to the line feed would take the
        // forbid for a comment.
        let parts = split_policies("permit(a);// x\rforbid(b);").unwrap();
        assert_eq!(parts.statements.len(), 2);
    }

    #[test]
    fn brackets_are_bounded() {
        let nested = |depth: usize| {
            format!(
                "permit(p) when {{ {}true{} }};",
                "(".repeat(depth),
                ")".repeat(depth)
            )
        };
        assert!(split_policies(&nested(NESTING_MAX - 1)).is_ok());
        let error = split_policies(&nested(NESTING_MAX)).unwrap_err();
        assert!(error.message.contains("nest deeper"), "{error:?}");
        assert!(split_policies(&"(".repeat(1_000_000)).is_err());
        // Inside a string or a comment it is only text.
        assert!(split_policies(&format!("permit(\"{}\");", "(".repeat(1000))).is_ok());
        assert!(split_policies(&format!("// {}\npermit(a);", "(".repeat(1000))).is_ok());
        let record = |depth: usize| {
            format!(
                "entity A = {{ x: {}Long{} }};",
                "Set<".repeat(depth),
                ">".repeat(depth)
            )
        };
        assert!(check_schema(&record(80)).is_ok());
        assert!(check_schema(&record(NESTING_MAX)).is_err());
    }

    #[test]
    fn chains_are_bounded_and_sets_are_not() {
        let when = |text: String| format!("permit(p) when {{ {text} }};");
        let chain = |n: usize, operator: &str| vec!["context.a"; n].join(operator);
        assert!(split_policies(&when(chain(170, " || "))).is_ok());
        for operator in [" || ", " && ", " + ", ".", " == "] {
            assert!(
                split_policies(&when(chain(190, operator))).is_err(),
                "{operator}"
            );
        }
        assert!(split_policies(&when("if a then b else ".repeat(40))).is_err());
        assert!(split_policies(&when("!".repeat(190))).is_err());
        let indexes = |n: usize| when(format!("context{} == 1", "[\"a\"]".repeat(n)));
        assert!(split_policies(&indexes(150)).is_ok());
        for n in [190, 3_000, 100_000] {
            assert!(split_policies(&indexes(n)).is_err(), "{n}");
        }
        let calls = format!("context.a{}", ".contains(1)".repeat(100));
        assert!(split_policies(&when(calls)).is_err());
        let set = format!("[{}].contains(context.a)", vec!["\"x\""; 10_000].join(", "));
        assert!(split_policies(&when(set)).is_ok());
        // Many small policies are not one deep one.
        assert!(split_policies(&when("a && b".into()).repeat(1000)).is_ok());
    }

    #[test]
    fn depth_under_a_bracket_counts_for_what_follows_it() {
        // `((x || 80 more) || 80 more) || …` is one left-leaning tree: each level is only 80
        // wide, but the tree is as high as their sum.
        let mut text = String::from("x");
        for _ in 0..3 {
            text = format!("({text}){}", " || x".repeat(80));
        }
        assert!(split_policies(&format!("permit(p) when {{ {text} }};")).is_err());
    }

    proptest::proptest! {
        /// Whatever the text, nothing of it is lost between the parts.
        #[test]
        fn the_parts_are_the_whole(text in "[a;/\"\\\\(){}\\[\\],&|<>if \n\r\u{e9}]{0,80}") {
            if let Ok(parts) = split_policies(&text) {
                let joined: String =
                    parts.statements.iter().map(|statement| statement.text).collect();
                proptest::prop_assert_eq!(joined + parts.rest, text.clone());
            }
            let _ = check_schema(&text);
        }
    }
}
