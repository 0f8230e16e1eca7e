package dir

import (
	"bytes"
	"encoding/json"
	"regexp"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// chunk is the text of one YAML document and the line of the file it starts at.
type chunk struct {
	text []byte
	line int
}

// split cuts a YAML stream into documents, so that one that is broken does not
// take those after it along. Directives and comments stay with the document that
// they precede.
func split(data []byte) []chunk {
	var chunks []chunk
	start, startLine := 0, 1
	begun, said := false, false // a marker was seen; anything else was
	cut := func(end, line int) {
		if said {
			chunks = append(chunks, chunk{data[start:end], startLine})
		}
		if begun || said {
			start, startLine, begun, said = end, line, false, false
		}
	}
	for at, line := 0, 1; at < len(data); line++ {
		end := len(data)
		if i := bytes.IndexByte(data[at:], '\n'); i >= 0 {
			end = at + i + 1
		}
		text := bytes.TrimRight(data[at:end], " \t\r\n")
		switch {
		case marks(text, "---"):
			cut(at, line)
			begun, said = true, len(text) > len("---")
		case marks(text, "..."):
			cut(end, line+1)
			start, startLine = end, line+1
		case len(text) > 0 && text[0] != '#' && text[0] != '%':
			said = true
		}
		at = end
	}
	cut(len(data), 0)
	return chunks
}

// marks says whether a line is the marker of a document's start or end, which
// may be followed by something.
func marks(line []byte, marker string) bool {
	rest, ok := bytes.CutPrefix(line, []byte(marker))
	return ok && (len(rest) == 0 || rest[0] == ' ' || rest[0] == '\t')
}

func (d *decoder) yaml(data []byte) {
	for _, c := range split(data) {
		if !d.counted(c.line) {
			return
		}
		text := bytes.TrimSpace(c.text)
		if len(text) > 0 && text[0] == '{' && json.Valid(text) {
			d.json(c.text, c.line)
			continue
		}
		if len(c.text) > MaxYAML || yamlValues(c.text) > maxYAMLValues {
			h := scrape(c.text)
			d.fail(c.line, h.object(), "", "the YAML document is larger than %d MiB or holds more than %d values: split it, or write it as JSON", MaxYAML>>20, maxYAMLValues)
			continue
		}
		d.budget = 2*len(c.text) + min(maxAliased, d.aliased)
		d.yamlDocument(c)
		d.aliased -= max(0, min(maxAliased, d.aliased)-max(0, d.budget))
	}
}

// yamlValues is an upper bound of how many values YAML text holds: each but the
// first has one of these before it.
func yamlValues(text []byte) int {
	n := 0
	for _, b := range text {
		switch b {
		case '\n', ',', '[', '{', ':', '?', '-':
			n++
		}
	}
	return n
}

var yamlError = regexp.MustCompile(`^yaml: (?:line (\d+): )?(.*)$`)

// errorLine splits a syntax error into its line in the file and its text.
func (c chunk) errorLine(err error) (int, string) {
	m := yamlError.FindStringSubmatch(err.Error())
	if m == nil {
		return c.line, err.Error()
	}
	n, _ := strconv.Atoi(m[1])
	if n == 0 {
		return c.line, m[2]
	}
	if strings.HasPrefix(m[2], "did not find expected") {
		n++ // yaml.v3 counts from 0 in errors of its parser, from 1 in those of its scanner
	}
	lines := 1 + bytes.Count(bytes.TrimSpace(c.text), newline)
	return c.line + min(n, lines) - 1, m[2]
}

// yamlDocument reads an object or a list.
func (d *decoder) yamlDocument(c chunk) {
	var doc yaml.Node
	if err := yaml.Unmarshal(c.text, &doc); err != nil {
		h := scrape(c.text)
		line, text := c.errorLine(err)
		d.fail(line, h.object(), "", "%s: mend the YAML", clip(text))
		return
	}
	if len(doc.Content) == 0 || doc.Content[0].ShortTag() == "!!null" {
		return
	}
	root := doc.Content[0]
	at := &lines{first: c.line + root.Line - 1, tree: root, base: c.line}
	if root.Kind != yaml.MappingNode {
		d.fail(at.first, "", "", "this is no Kubernetes object: it has to be a mapping with kind and apiVersion")
		return
	}
	item, isList := listOf(yamlHead(root))
	if !isList {
		d.yamlObject(root, at, d.object)
		return
	}
	d.yamlItems(root, c, item)
}

func (d *decoder) yamlItems(list *yaml.Node, c chunk, item head) {
	items := follow(field(list, "items"))
	if items == nil || items.ShortTag() == "!!null" {
		return
	}
	if items.Kind != yaml.SequenceNode {
		d.fail(c.line+items.Line-1, item.Kind+"List", "items", "items is no list: write a list of objects")
		return
	}
	for _, n := range items.Content {
		at := &lines{first: c.line + n.Line - 1, tree: n, base: c.line}
		if !d.counted(at.first) {
			return
		}
		if follow(n).Kind != yaml.MappingNode {
			d.fail(at.first, "", "", "the item is no Kubernetes object: write a mapping with kind and apiVersion")
			continue
		}
		d.yamlObject(n, at, func(m *manifest) { d.item(m, item) })
	}
}

// yamlObject turns one object into JSON and hands it on.
func (d *decoder) yamlObject(n *yaml.Node, at *lines, then func(*manifest)) {
	m := &manifest{head: yamlHead(n), lines: at}
	if k, known := kinds[m.Kind]; d.take == nil && m.Kind != "" && m.APIVersion != "" && (!known || m.APIVersion != k.apiVersion) {
		then(m) // not read whatever it says
		return
	}
	w := jsonWriter{budget: &d.budget}
	w.node(n, 0)
	if w.err != nil {
		d.fail(at.base+max(w.at.Line-1, 0), m.object(), "", "%v", w.err)
		return
	}
	m.json = w.out
	then(m)
}

// yamlHead reads the head of an object.
func yamlHead(n *yaml.Node) head {
	var h head
	meta := field(n, "metadata")
	h.Kind, h.APIVersion = text(field(n, "kind")), text(field(n, "apiVersion"))
	h.Metadata.Name, h.Metadata.Namespace = text(field(meta, "name")), text(field(meta, "namespace"))
	return h
}

// text is a scalar's text, "" for anything else.
func text(n *yaml.Node) string {
	if n = follow(n); n == nil || n.Kind != yaml.ScalarNode || n.ShortTag() == "!!null" {
		return ""
	}
	return n.Value
}

// field is the value of a key in a mapping, nil where there is none.
func field(n *yaml.Node, key string) *yaml.Node {
	if n = follow(n); n == nil || n.Kind != yaml.MappingNode {
		return nil
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			return n.Content[i+1]
		}
	}
	return nil
}

// follow is what an alias stands for. An alias never stands for an alias.
func follow(n *yaml.Node) *yaml.Node {
	if n != nil && n.Kind == yaml.AliasNode {
		return n.Alias
	}
	return n
}

var headLine = regexp.MustCompile(`^(\s*)(kind|apiVersion|metadata|name|namespace):\s*["']?([\w.-]*)`)

// scrape guesses the head of a document that is not YAML: kind at the margin,
// name and namespace in the lines indented below metadata.
func scrape(data []byte) head {
	var h head
	inside := ""
	for line := range strings.Lines(string(data[:min(len(data), 64<<10)])) {
		m := headLine.FindStringSubmatch(line)
		switch {
		case m == nil && line != "" && line[0] != ' ' && line[0] != '#':
			inside = ""
		case m == nil:
		case m[1] == "":
			inside = m[2]
			switch m[2] {
			case "kind":
				h.Kind = m[3]
			case "apiVersion":
				h.APIVersion = m[3]
			}
		case inside == "metadata" && m[2] == "name" && h.Metadata.Name == "":
			h.Metadata.Name = m[3]
		case inside == "metadata" && m[2] == "namespace" && h.Metadata.Namespace == "":
			h.Metadata.Namespace = m[3]
		}
	}
	return h
}
