package kubeproxy

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// errByHand is of what would have to be written anew to change one field of it.
var errByHand = errors.New("it is written in a way that one field of it cannot be changed alone: change it by hand")

// Value is a field of a configuration as it is written there: "131072", "24h", `"24h"`.
// It is "null" for one that is there without a value, and "" for one that is not there.
func Value(data []byte, path string) (string, error) {
	e, err := open(data)
	if err != nil {
		return "", err
	}
	parent, name := e.parent(path)
	key, node := field(parent, name)
	if node == nil {
		return "", nil
	}
	start, end, err := e.span(key, node)
	if err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	if start == end {
		return "null", nil
	}
	return e.text[start:end], nil
}

// Set gives a field of a configuration a value, as YAML, and changes no other byte of it:
// comments, order and what other documents say stay. Without a value it takes the field
// away. A path has one or two names: "mode", "conntrack.min". What would change more is
// an error, and so is a configuration that is no YAML block (JSON).
func Set(data []byte, path, value string) ([]byte, error) {
	e, err := open(data)
	if err != nil {
		return nil, err
	}
	text, err := e.set(path, value)
	if err == nil {
		err = e.alone(text, path, value)
	}
	if err != nil {
		return nil, fmt.Errorf("set %s: %w", path, err)
	}
	return []byte(text), nil
}

// edition is a text, the places of its lines, and the configuration in it.
type edition struct {
	text  string
	lines []int
	root  *yaml.Node
}

func open(data []byte) (*edition, error) {
	root, err := find(data)
	if err != nil {
		return nil, err
	}
	e := &edition{text: string(data), lines: []int{0}, root: root}
	for i, b := range data {
		if b == '\n' {
			e.lines = append(e.lines, i+1)
		}
	}
	if root.Kind != yaml.MappingNode || root.Style&yaml.FlowStyle != 0 {
		return nil, errByHand
	}
	return e, nil
}

// parent is the mapping that a field is in, nil where that is not there.
func (e *edition) parent(path string) (parent *yaml.Node, name string) {
	above, name, nested := strings.Cut(path, ".")
	if !nested {
		return e.root, path
	}
	_, parent = field(e.root, above)
	return parent, name
}

// field is a key of a mapping, and its value.
func field(mapping *yaml.Node, name string) (key, value *yaml.Node) {
	if mapping == nil || mapping.Kind != yaml.MappingNode {
		return nil, nil
	}
	for i := 0; i+1 < len(mapping.Content); i += 2 {
		if mapping.Content[i].Value == name {
			return mapping.Content[i], mapping.Content[i+1]
		}
	}
	return nil, nil
}

// at is where a node begins.
func (e *edition) at(n *yaml.Node) int {
	at := e.lines[n.Line-1]
	for range n.Column - 1 {
		_, size := utf8.DecodeRuneInString(e.text[at:])
		at += size
	}
	return at
}

// span is where the value of a key is written; start is end for one that is not.
func (e *edition) span(key, value *yaml.Node) (start, end int, err error) {
	if value.Kind == yaml.AliasNode || value.Anchor != "" || value.Style&yaml.TaggedStyle != 0 {
		return 0, 0, errByHand
	}
	if null(value) && value.Value == "" {
		if end, err = e.end(key); err != nil {
			return 0, 0, err
		}
		colon := strings.IndexByte(e.text[end:], ':')
		if colon < 0 {
			return 0, 0, errByHand
		}
		return end + colon + 1, end + colon + 1, nil
	}
	end, err = e.end(value)
	return e.at(value), end, err
}

// end is where a node ends that is written in one line.
func (e *edition) end(n *yaml.Node) (int, error) {
	start := e.at(n)
	rest, _, _ := strings.Cut(e.text[start:], "\n")
	length := -1
	switch {
	case n.Kind != yaml.ScalarNode && n.Style&yaml.FlowStyle != 0:
		length = closing(rest)
	case n.Kind != yaml.ScalarNode:
	case n.Style&(yaml.DoubleQuotedStyle|yaml.SingleQuotedStyle) != 0:
		length = quoted(rest)
	case n.Style == 0 && strings.HasPrefix(rest, n.Value):
		length = len(n.Value)
	}
	if length < 0 {
		return 0, errByHand
	}
	return start + length, nil
}

// quoted is how long a text in quotes is at the beginning of a line, -1 if it goes on in
// the next one.
func quoted(line string) int {
	for i := 1; i < len(line); i++ {
		switch {
		case line[0] == '"' && line[i] == '\\':
			i++
		case line[i] != line[0]:
		case line[0] == '\'' && i+1 < len(line) && line[i+1] == '\'':
			i++
		default:
			return i + 1
		}
	}
	return -1
}

// closing is how long a list or mapping in brackets is at the beginning of a line.
func closing(line string) int {
	deep := 0
	for i := 0; i < len(line); i++ {
		switch line[i] {
		case '"', '\'':
			n := quoted(line[i:])
			if n < 0 {
				return -1
			}
			i += n - 1
		case '[', '{':
			deep++
		case ']', '}':
			if deep--; deep == 0 {
				return i + 1
			}
		case '#':
			return -1
		}
	}
	return -1
}

// set is the text with a field's value, which is taken away if it is empty.
func (e *edition) set(path, value string) (string, error) {
	parent, name := e.parent(path)
	key, node := field(parent, name)
	switch {
	case node == nil && value == "":
		return e.text, nil
	case node == nil:
		return e.insert(parent, path, value)
	case value == "":
		return e.remove(parent, path, key, node)
	}
	start, end, err := e.span(key, node)
	if err != nil {
		return "", err
	}
	if start == end {
		value = " " + value
	}
	return e.text[:start] + value + e.text[end:], nil
}

// insert writes a field that is not there, as the last of its mapping.
func (e *edition) insert(parent *yaml.Node, path, value string) (string, error) {
	above, name, nested := strings.Cut(path, ".")
	switch {
	case !nested:
		return e.append(e.root, path+": "+value), nil
	case parent == nil:
		return e.append(e.root, above+":", "  "+name+": "+value), nil
	case null(parent):
		key, _ := field(e.root, above)
		start, end, err := e.span(key, parent)
		if err != nil {
			return "", err
		}
		braces := "{" + name + ": " + value + "}"
		if start == end {
			braces = " " + braces
		}
		return e.text[:start] + braces + e.text[end:], nil
	case parent.Kind != yaml.MappingNode || parent.Anchor != "":
		return "", errByHand
	case parent.Style&yaml.FlowStyle != 0:
		start := e.at(parent) + 1
		comma := ", "
		if len(parent.Content) == 0 {
			comma = ""
		}
		return e.text[:start] + name + ": " + value + comma + e.text[start:], nil
	}
	return e.append(parent, name+": "+value), nil
}

// append writes lines after a mapping's last one.
func (e *edition) append(mapping *yaml.Node, lines ...string) string {
	indent := strings.Repeat(" ", mapping.Column-1)
	text := ""
	for _, line := range lines {
		text += indent + line + "\n"
	}
	last := lastLine(mapping)
	if last >= len(e.lines) { // the last line of all, without an end
		return e.text + "\n" + strings.TrimSuffix(text, "\n")
	}
	return e.text[:e.lines[last]] + text + e.text[e.lines[last]:]
}

// lastLine is the number of the last line in which something of a node begins.
func lastLine(n *yaml.Node) int {
	last := n.Line
	for _, c := range n.Content {
		last = max(last, lastLine(c))
	}
	return last
}

// remove takes a field away, and with the last one of a mapping what it is in.
func (e *edition) remove(parent *yaml.Node, path string, key, node *yaml.Node) (string, error) {
	_, end, err := e.span(key, node)
	if err != nil {
		return "", err
	}
	if parent.Style&yaml.FlowStyle != 0 {
		rest := strings.TrimPrefix(strings.TrimPrefix(e.text[end:], ","), " ")
		return e.text[:e.at(key)] + rest, nil
	}
	if above, _, nested := strings.Cut(path, "."); nested && len(parent.Content) == 2 {
		key, _ = field(e.root, above)
	}
	start := e.lines[key.Line-1]
	if node.Line < len(e.lines) {
		return e.text[:start] + e.text[e.lines[node.Line]:], nil
	}
	return strings.TrimSuffix(e.text[:start], "\n"), nil
}

// alone says what else than a field a new text changes.
func (e *edition) alone(text, path, value string) error {
	got, err := Value([]byte(text), path)
	if err != nil {
		return err
	}
	before, err := without(e.text, path)
	if err != nil {
		return err
	}
	after, err := without(text, path)
	if err != nil {
		return err
	}
	if got != value || !reflect.DeepEqual(before, after) {
		return errByHand
	}
	return nil
}

// without is all that a text says but one field of the configuration in it, and a mapping
// that says nothing else.
func without(text, path string) (all []any, err error) {
	for decoder := yaml.NewDecoder(bytes.NewReader([]byte(text))); ; {
		var one any
		if err := decoder.Decode(&one); errors.Is(err, io.EOF) {
			return all, nil
		} else if err != nil {
			return nil, err
		}
		if m, is := one.(map[string]any); is && m["kind"] == Kind {
			above, name, nested := strings.Cut(path, ".")
			below, isMap := m[above].(map[string]any)
			if nested && isMap {
				delete(below, name)
			}
			if !nested || m[above] == nil || isMap && len(below) == 0 {
				delete(m, above)
			}
		}
		all = append(all, one)
	}
}
