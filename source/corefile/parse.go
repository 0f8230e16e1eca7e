package corefile

import (
	"fmt"
	"slices"
	"strings"

	"github.com/coredns/caddy/caddyfile"
)

// Limits of what is read: words, those of snippets included, and imports of snippets.
const (
	mostWords   = 10000
	mostImports = 200
)

// file is one of the texts that make up a Corefile.
type file struct {
	// path is where the DNS servers have it, "" where that is not known; name is for messages.
	path, name string
}

// place is a line of a file.
type place struct {
	file *file
	line int
}

// String is "Corefile:12", or "coredns-custom/log.override:3".
func (p place) String() string { return fmt.Sprintf("%s:%d", p.file.name, p.line) }

// word is one word of a text.
type word struct {
	text string
	place
}

// end is the line on which a word ends.
func (w word) end() int { return w.line + strings.Count(w.text, "\n") }

// onNewLine and onSameLine are how CoreDNS tells lines apart (isNewLine and NextArg of
// caddyfile.Dispenser): by the numbers of lines, so that what a snippet brings, which stands
// further up, is on neither.
func (w word) onNewLine(after *word) bool {
	return after == nil || after.file != w.file || after.end() < w.line
}

func (w word) onSameLine(after *word) bool {
	return after != nil && after.file == w.file && after.end() == w.line
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
	at   place
	args []string
	// body are the lines in braces.
	body []setting
	// table is what hosts answers from; where it is nil, untabled says why it is not known.
	table    *table
	untabled string
}

// setting is one line in the braces of a directive. Deeper braces are words of it.
type setting struct {
	words []string
	at    place
}

// parser groups words, as CoreDNS' own parser does (caddyfile.Parse).
type parser struct {
	files *Files
	words []word
	// last is the word that was taken last, and before the one before it; nil for none. Of
	// imports nothing is left here.
	last, before *word
	snippets     map[string][]word
	// texts are the words of files that were imported.
	texts  map[string][]word
	blocks []block
	// alien is why there may be more blocks than are known.
	alien          string
	taken, imports int
}

// mistake is of a text of which CoreDNS would not start, or that is too much to read.
func mistake(at place, format string, args ...any) error {
	return fmt.Errorf("%v: %s", at, fmt.Sprintf(format, args...))
}

// lex splits the text of a file into words.
func lex(text string, of *file) (words []word, err error) {
	d := caddyfile.NewDispenser(of.name, strings.NewReader(text))
	for d.Next() {
		w := word{d.Val(), place{of, d.Line()}}
		if strings.Contains(w.text, "{$") || strings.Contains(w.text, "{%") {
			return nil, mistake(w.place, "%s is from the environment of the DNS servers", clip(w.text))
		}
		words = append(words, w)
	}
	return words, nil
}

func parse(text string, files *Files) (*parser, error) {
	words, err := lex(text, &file{files.corefile(), Key})
	if err != nil {
		return nil, err
	}
	p := &parser{files: files, words: words, snippets: map[string][]word{}, texts: map[string][]word{}}
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
	p.before, p.last = p.last, &w
	p.taken++
	return w, p.bounded(w.place, len(p.words))
}

// bounded says whether so many words more are not too many.
func (p *parser) bounded(at place, more int) error {
	if p.taken+more > mostWords {
		return mistake(at, "there are more than %d words, those of snippets and other files included", mostWords)
	}
	return nil
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
		if w.text == "import" && w.onNewLine(p.before) {
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
				return mistake(w.place, "another zone has to follow the comma")
			}
			return nil
		}
		if w.text == "{" && !another {
			return p.contents(b, w)
		}
		var key string
		if key, another = strings.CutSuffix(w.text, ","); key == "" || key == "{" {
			return mistake(w.place, "%q is no zone", w.text)
		}
		b.keys = append(b.keys, word{key, w.place})
		more = len(p.words) > 0 && (another || !p.words[0].onNewLine(p.last))
		if another && !more {
			return mistake(w.place, "another zone has to follow the comma")
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
		return mistake(b.keys[0].place, "the snippet %s has no braces", clip(name))
	}
	// A single server block needs no braces.
	return p.directives(b, false)
}

// contents is what follows the opening brace of a block.
func (p *parser) contents(b block, open word) error {
	if len(b.keys) == 0 {
		return mistake(open.place, "a server block without a zone")
	}
	if name, snippet := b.snippet(); snippet {
		if _, twice := p.snippets[name]; twice {
			return mistake(open.place, "the snippet %s is there twice", clip(name))
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
	return nil, mistake(open.place, "the brace is not closed")
}

// splice puts the words of a snippet, or of files, in the place of their import. It returns
// why it is not known what is imported.
func (p *parser) splice(at word) (alien string, err error) {
	before := p.before
	if len(p.words) == 0 || !p.words[0].onSameLine(p.last) {
		return "", mistake(at.place, "import of nothing")
	}
	what, err := p.next()
	if err != nil {
		return "", err
	}
	if len(p.words) > 0 && p.words[0].onSameLine(p.last) {
		return "", mistake(at.place, "import takes one name")
	}
	if p.imports++; p.imports > mostImports {
		return "", mistake(at.place, "there are more than %d imports", mostImports)
	}
	p.last = before
	words, known := p.snippets[what.text]
	if !known {
		if words, alien, err = p.imported(what); err != nil || alien != "" {
			return alien, err
		}
	}
	if err := p.bounded(at.place, len(words)+len(p.words)); err != nil {
		return "", err
	}
	p.words = slices.Concat(words, p.words)
	return "", nil
}

// imported are the words of the files that a pattern stands for (doImport of caddyfile), in
// the order of their names.
func (p *parser) imported(what word) (words []word, alien string, err error) {
	unknown := func(why string) ([]word, string, error) {
		return nil, fmt.Sprintf("%v: import %s, of which only the DNS servers know what it brings: %s", what.place, clip(what.text), why), nil
	}
	if what.text == "" {
		return nil, "", mistake(what.place, "import of nothing")
	}
	if strings.Count(what.text, "*") > 1 || strings.Count(what.text, "?") > 1 || strings.ContainsAny(what.text, `[]\`) {
		return nil, "", mistake(what.place, "import %s is not understood: one wildcard is allowed, * or ?", clip(what.text))
	}
	found, why, err := p.files.glob(what.text, what.file.path)
	switch {
	case err != nil:
		return nil, "", mistake(what.place, "import %s: %v", clip(what.text), err)
	case why != "":
		return unknown(why)
	}
	for _, f := range found {
		if _, again := p.texts[f.path]; !again {
			if p.texts[f.path], err = lex(f.text, &f.file); err != nil {
				return nil, "", err
			}
		}
		words = append(words, p.texts[f.path]...)
		if err := p.bounded(what.place, len(words)); err != nil {
			return nil, "", err
		}
	}
	return words, "", nil
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
			return mistake(w.place, "a closing brace without an opening one")
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
		return mistake(b.keys[0].place, "the brace of the server block is not closed")
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
	d = directive{name: name.text, at: name.place}
	depth, closed := 0, false
	for len(p.words) > 0 {
		w, starts := p.words[0], !p.words[0].onSameLine(p.last)
		if depth == 0 && w.onNewLine(p.last) && w.text != "{" {
			return d, alien, nil
		}
		if _, err := p.next(); err != nil {
			return d, "", err
		}
		if w.text == "import" && w.onNewLine(p.before) {
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
		lone := w.text == "{" && (closed || starts) || w.text == "}" && (depth == 0 || !starts && len(d.body) > 0)
		if depth < 2 && lone || closed {
			return d, "", mistake(w.place, "%s is not where it can be", clip(w.text))
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
		d.take(w, starts, depth)
	}
	if depth > 0 {
		return d, "", mistake(d.at, "the brace of %s is not closed", clip(d.name))
	}
	return d, alien, nil
}

// take adds a word, which may start a line, to the arguments or to the lines in braces.
func (d *directive) take(w word, starts bool, depth int) {
	switch {
	case depth == 0:
		d.args = append(d.args, w.text)
	case starts || len(d.body) == 0:
		d.body = append(d.body, setting{[]string{w.text}, w.place})
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
