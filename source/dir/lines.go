package dir

import (
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// lines finds the line of the file in which a field of an object stands.
type lines struct {
	// first is the line of the object.
	first int
	// tree is the object; its line 1 is line base of the file.
	tree *yaml.Node
	base int
	// json is the object where it was written as JSON; it is parsed as YAML,
	// which all JSON is, when the first field is asked for.
	json []byte
}

// of is the line of a field such as "spec.ports[0].port", or of the innermost
// part of it that is there.
func (l *lines) of(field string) int {
	if field == "" {
		return l.first
	}
	if l.json != nil && len(l.json) <= maxBlame {
		var doc yaml.Node
		if yaml.Unmarshal(l.json, &doc) == nil && len(doc.Content) > 0 {
			l.tree, l.base = doc.Content[0], l.first
		}
	}
	l.json = nil
	if l.tree == nil {
		return l.first
	}
	if line := find(l.tree, field, 0); line > 0 {
		return l.base + line - 1
	}
	return l.first
}

// find is the line of the deepest key or element on the path, 0 if there is none.
func find(n *yaml.Node, path string, depth int) int {
	n = follow(n)
	if path == "" || n == nil || depth > maxDepth {
		return 0
	}
	if n.Kind == yaml.SequenceNode {
		return findElement(n, path, depth)
	}
	if n.Kind != yaml.MappingNode {
		return 0
	}
	path = strings.TrimPrefix(path, ".")
	line := 0
	for i := 0; i+1 < len(n.Content); i += 2 {
		// A key may have dots, so it is looked for in the path, not the reverse.
		rest, ok := strings.CutPrefix(path, n.Content[i].Value)
		if ok && (rest == "" || rest[0] == '.' || rest[0] == '[') {
			line = n.Content[i].Line
			if deeper := find(n.Content[i+1], rest, depth+1); deeper > 0 {
				line = deeper
			}
		}
	}
	return line
}

func findElement(n *yaml.Node, path string, depth int) int {
	number, rest, ok := strings.Cut(strings.TrimPrefix(path, "["), "]")
	i, err := strconv.Atoi(number)
	if !ok || err != nil || i < 0 || i >= len(n.Content) {
		return 0
	}
	if deeper := find(n.Content[i], rest, depth+1); deeper > 0 {
		return deeper
	}
	return n.Content[i].Line
}
