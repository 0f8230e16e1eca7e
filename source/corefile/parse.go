package corefile

import (
	"fmt"
	"strings"

	"github.com/coredns/caddy/caddyfile"
)

// Limits of what is read: words, those of snippets included, and imports of snippets.
const (
	mostWords   = 10000
	mostImports = 200
)

// word is one word of the text.
type word struct {
	text string
	line int
	// first says that it begins a line.
	first bool
}

// block is a server block: the zones that it is for, and what is done there.
type block struct {
	keys       []word
	directives []directive
	// alien is why it is not known what else is in it: "" if it is.
	alien string
}

// directive is a plugin and its settings.
type directive struct {
	name string
	line int
	args []string
	// body are the lines in braces.
	body []setting
}

// setting is one line in the braces of a directive. Deeper braces are words of it.
type setting struct {
	words []string
	line  int
}

// parser groups words, as CoreDNS' own parser does (caddyfile.Parse).
type parser struct {
	words    []word
	snippets map[string][]word
	blocks   []block
	// alien is why there may be more blocks than are known.
	alien          string
	taken, imports int
}

// mistake is of a text of which CoreDNS would not start, or that is too much to read.
func mistake(line int, format string, args ...any) error {
	return fmt.Errorf("%s:%d: %s", Key, line, fmt.Sprintf(format, args...))
}

// lex splits a text into words.
func lex(text string) (words []word) {
	d := caddyfile.NewDispenser("Corefile", strings.NewReader(text))
	end := 0 // the line on which the last word ends
	for d.Next() {
		words = append(words, word{d.Val(), d.Line(), d.Line() != end})
		end = d.Line() + strings.Count(d.Val(), "\n")
	}
	return words
}

func parse(text string) (*parser, error) {
	p := &parser{words: lex(text), snippets: map[string][]word{}}
	for _, w := range p.words {
		if strings.Contains(w.text, "{$") || strings.Contains(w.text, "{%") {
			return nil, mistake(w.line, "%s is from the environment of the DNS servers", clip(w.text))
		}
	}
	for len(p.words) > 0 {
		if err := p.block(); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// next takes a word.
func (p *parser) next() (w word, err error) {
	w, p.words = p.words[0], p.words[1:]
	if p.taken++; p.taken+len(p.words) > mostWords {
		return w, mistake(w.line, "there are more than %d words, those of snippets included", mostWords)
	}
	return w, nil
}

// block takes a server block or a snippet.
func (p *parser) block() error {
	var b block
	another := false // a comma says so
	for more := true; more; {
		w, err := p.next()
		if err != nil {
			return err
		}
		if w.text == "import" && w.first {
			alien, err := p.splice(w)
			if p.alien == "" {
				p.alien = alien
			}
			if err != nil {
				return err
			}
			if len(p.words) > 0 {
				continue
			}
			if len(b.keys) > 0 {
				return mistake(w.line, "another zone has to follow the comma")
			}
			return nil
		}
		if w.text == "{" && !another {
			return p.contents(b, w)
		}
		var key string
		if key, another = strings.CutSuffix(w.text, ","); key == "" || key == "{" {
			return mistake(w.line, "%q is no zone", w.text)
		}
		b.keys = append(b.keys, word{key, w.line, w.first})
		more = len(p.words) > 0 && (another || !p.words[0].first)
		if another && !more {
			return mistake(w.line, "another zone has to follow the comma")
		}
	}
	if len(p.words) > 0 && p.words[0].text == "{" { // on a line of its own
		w, err := p.next()
		if err != nil {
			return err
		}
		return p.contents(b, w)
	}
	if name, snippet := b.snippet(); snippet {
		return mistake(b.keys[0].line, "the snippet %s has no braces", clip(name))
	}
	// A single server block needs no braces.
	return p.directives(b, false)
}

// contents is what follows the opening brace of a block.
func (p *parser) contents(b block, open word) error {
	if len(b.keys) == 0 {
		return mistake(open.line, "a server block without a zone")
	}
	if name, snippet := b.snippet(); snippet {
		if _, twice := p.snippets[name]; twice {
			return mistake(open.line, "the snippet %s is there twice", clip(name))
		}
		words, err := p.braced(open)
		p.snippets[name] = words
		return err
	}
	return p.directives(b, true)
}

// snippet is the name of what is no server block: "(name)".
func (b *block) snippet() (name string, is bool) {
	if len(b.keys) != 1 {
		return "", false
	}
	name, begins := strings.CutPrefix(b.keys[0].text, "(")
	name, ends := strings.CutSuffix(name, ")")
	return name, begins && ends
}

// braced are the words up to the brace that closes one.
func (p *parser) braced(open word) (words []word, err error) {
	for depth := 1; len(p.words) > 0; {
		w, err := p.next()
		if err != nil {
			return nil, err
		}
		switch w.text {
		case "{":
			depth++
		case "}":
			if depth--; depth == 0 {
				return words, nil
			}
		}
		words = append(words, w)
	}
	return nil, mistake(open.line, "the brace is not closed")
}

// splice puts the words of a snippet in the place of its import. It returns why it is not
// known what is imported.
func (p *parser) splice(at word) (alien string, err error) {
	if len(p.words) == 0 || p.words[0].first {
		return "", mistake(at.line, "import of nothing")
	}
	what, err := p.next()
	if err != nil {
		return "", err
	}
	if len(p.words) > 0 && !p.words[0].first && p.words[0].text != "}" {
		return "", mistake(at.line, "import takes one name")
	}
	words, known := p.snippets[what.text]
	if p.imports++; p.imports > mostImports {
		return "", mistake(at.line, "there are more than %d imports", mostImports)
	}
	if !known {
		return fmt.Sprintf("Corefile:%d: import %s, of which only the DNS servers know what it brings", at.line, clip(what.text)), nil
	}
	spliced := make([]word, 0, len(words)+len(p.words))
	p.words = append(append(spliced, words...), p.words...)
	if len(words) > 0 {
		p.words[0].first = true
	}
	return "", nil
}

// directives takes what is in a server block.
func (p *parser) directives(b block, braces bool) error {
	for len(p.words) > 0 {
		w, err := p.next()
		if err != nil {
			return err
		}
		switch {
		case w.text == "}" && braces:
			p.blocks = append(p.blocks, b)
			return nil
		case w.text == "}":
			return mistake(w.line, "a closing brace without an opening one")
		case w.text == "import":
			alien, err := p.splice(w)
			if err != nil {
				return err
			}
			b.alienated(alien)
			continue
		}
		d, alien, err := p.directive(w)
		if err != nil {
			return err
		}
		b.alienated(alien)
		b.directives = append(b.directives, d)
	}
	if braces {
		return mistake(b.keys[0].line, "the brace of the server block is not closed")
	}
	if len(b.keys) > 0 {
		p.blocks = append(p.blocks, b)
	}
	return nil
}

func (b *block) alienated(why string) {
	if b.alien == "" {
		b.alien = why
	}
}

// directive takes a plugin's arguments and the lines in its braces.
func (p *parser) directive(name word) (d directive, alien string, err error) {
	d = directive{name: name.text, line: name.line}
	depth, closed := 0, false
	for len(p.words) > 0 {
		w := p.words[0]
		if depth == 0 && w.first && w.text != "{" {
			return d, alien, nil
		}
		if _, err := p.next(); err != nil {
			return d, "", err
		}
		if w.text == "import" && w.first {
			why, err := p.splice(w)
			if err != nil {
				return d, "", err
			}
			if alien == "" {
				alien = why
			}
			continue
		}
		// Plugins read braces that are elsewhere as something else.
		lone := w.text == "{" && (closed || w.first) || w.text == "}" && (depth == 0 || !w.first && len(d.body) > 0)
		if depth < 2 && lone || closed {
			return d, "", mistake(w.line, "%s is not where it can be", clip(w.text))
		}
		switch {
		case w.text == "{":
			depth++
		case w.text == "}":
			depth--
			closed = depth == 0
		}
		if depth == 1 && w.text == "{" || closed {
			continue
		}
		d.take(w, depth)
	}
	if depth > 0 {
		return d, "", mistake(d.line, "the brace of %s is not closed", clip(d.name))
	}
	return d, alien, nil
}

// take adds a word to the arguments or to the lines in braces.
func (d *directive) take(w word, depth int) {
	switch {
	case depth == 0:
		d.args = append(d.args, w.text)
	case w.first || len(d.body) == 0:
		d.body = append(d.body, setting{[]string{w.text}, w.line})
	default:
		last := &d.body[len(d.body)-1]
		last.words = append(last.words, w.text)
	}
}

// clip shortens what was read so that a message stays one line.
func clip(s string) string {
	s, _, _ = strings.Cut(s, "\n")
	if len(s) > 80 {
		return strings.ToValidUTF8(s[:80], "") + "..."
	}
	return s
}
