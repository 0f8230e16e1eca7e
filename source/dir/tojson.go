package dir

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// jsonWriter turns a YAML tree into JSON as kubectl does: yes, no, on and off
// are booleans, keys are text, aliases and merge keys are expanded. What it may
// write is limited, so that aliases of aliases end in an error and not in the
// memory of the machine.
type jsonWriter struct {
	out    []byte
	budget *int
	err    error
	at     *yaml.Node // where err is
}

var errAliased = errors.New("aliases make this larger than the limits allow: write it without them")

func (w *jsonWriter) fail(n *yaml.Node, err error) {
	if w.err == nil {
		w.err, w.at = err, n
	}
}

// spend takes n's share of the budget and says whether to go on.
func (w *jsonWriter) spend(n *yaml.Node, depth int) bool {
	*w.budget -= 1 + len(n.Value)
	switch {
	case w.err != nil:
		return false
	case depth > maxDepth:
		w.fail(n, fmt.Errorf("mappings and lists are nested more than %d deep: this is no manifest", maxDepth))
	case *w.budget < 0:
		w.fail(n, errAliased)
	case len(w.out) > MaxObject:
		w.fail(n, fmt.Errorf("the object is larger than %d MiB: split it", MaxObject>>20))
	}
	return w.err == nil
}

func (w *jsonWriter) node(n *yaml.Node, depth int) {
	if !w.spend(n, depth) {
		return
	}
	switch n.Kind {
	case yaml.AliasNode:
		w.node(n.Alias, depth+1)
	case yaml.MappingNode:
		w.out = append(w.out, '{')
		w.mapping(n, depth)
		w.out = append(w.out, '}')
	case yaml.SequenceNode:
		w.out = append(w.out, '[')
		for i, item := range n.Content {
			if i > 0 {
				w.out = append(w.out, ',')
			}
			w.node(item, depth+1)
		}
		w.out = append(w.out, ']')
	default:
		w.value(n)
	}
}

// mapping writes the fields of a mapping, and those that it merges in and does
// not have itself.
func (w *jsonWriter) mapping(n *yaml.Node, depth int) {
	own := map[string]bool(nil)
	for i := 0; i+1 < len(n.Content); i += 2 {
		if isMerge(n.Content[i]) {
			own = map[string]bool{}
		}
	}
	w.fields(n, depth, false, own)
	if own == nil {
		return
	}
	w.merges(n, depth, own)
}

// fields writes the fields of one mapping. Where have is not nil, it collects
// their keys; a merged mapping's fields that are there already are left out.
func (w *jsonWriter) fields(n *yaml.Node, depth int, merged bool, have map[string]bool) {
	for i := 0; i+1 < len(n.Content) && w.err == nil; i += 2 {
		if isMerge(n.Content[i]) {
			continue
		}
		key := w.key(n.Content[i])
		if !w.spend(n.Content[i], depth) || merged && have[key] {
			continue
		}
		if have != nil {
			have[key] = true
		}
		if w.out[len(w.out)-1] != '{' {
			w.out = append(w.out, ',')
		}
		w.text(key)
		w.out = append(w.out, ':')
		w.node(n.Content[i+1], depth+1)
	}
}

// merges writes what the merge keys of n bring in, the first of several first.
func (w *jsonWriter) merges(n *yaml.Node, depth int, have map[string]bool) {
	for i := 0; i+1 < len(n.Content); i += 2 {
		if !isMerge(n.Content[i]) {
			continue
		}
		from := []*yaml.Node{n.Content[i+1]}
		if list := follow(n.Content[i+1]); list.Kind == yaml.SequenceNode {
			from = list.Content
		}
		for _, m := range from {
			if m = follow(m); m.Kind != yaml.MappingNode {
				w.fail(n.Content[i], errors.New("<< merges mappings only: give it an alias of one"))
			}
			if !w.spend(m, depth+1) {
				return
			}
			w.fields(m, depth, true, have)
			w.merges(m, depth+1, have)
		}
	}
}

func isMerge(key *yaml.Node) bool { return key.ShortTag() == "!!merge" }

// key is the text of a key.
func (w *jsonWriter) key(n *yaml.Node) string {
	n = follow(n)
	if n.Kind != yaml.ScalarNode || n.ShortTag() == "!!null" {
		w.fail(n, errors.New("a key has to be text"))
		return ""
	}
	v, err := scalar(n)
	if err != nil {
		w.fail(n, err)
	}
	if s, ok := v.(string); ok {
		return s
	}
	return fmt.Sprint(v)
}

func (w *jsonWriter) value(n *yaml.Node) {
	v, err := scalar(n)
	if err != nil {
		w.fail(n, err)
		return
	}
	switch v := v.(type) {
	case string:
		w.text(v)
	case bool:
		w.out = strconv.AppendBool(w.out, v)
	case int64:
		w.out = strconv.AppendInt(w.out, v, 10)
	case uint64:
		w.out = strconv.AppendUint(w.out, v, 10)
	case float64:
		w.float(n, v)
	default:
		w.out = append(w.out, "null"...)
	}
}

func (w *jsonWriter) float(n *yaml.Node, v float64) {
	if math.IsNaN(v) || math.IsInf(v, 0) {
		w.fail(n, fmt.Errorf("%s is no number that Kubernetes knows: write an ordinary one, or put it in quotes", clip(n.Value)))
		return
	}
	w.out = strconv.AppendFloat(w.out, v, 'g', -1, 64)
}

func (w *jsonWriter) text(s string) {
	quoted, _ := json.Marshal(s) // no string makes it fail
	w.out = append(w.out, quoted...)
}

// scalar is a string, bool, int64, uint64, float64 or nil.
func scalar(n *yaml.Node) (any, error) {
	switch n.ShortTag() {
	case "!!null":
		return nil, nil
	case "!!bool":
		return boolean(n.Value)
	case "!!int", "!!float":
		var v any
		if err := n.Decode(&v); err != nil {
			return nil, errors.New(clip(strings.TrimPrefix(err.Error(), "yaml: ")))
		}
		if i, ok := v.(int); ok {
			return int64(i), nil
		}
		return v, nil
	case "!!binary":
		var s string
		if err := n.Decode(&s); err != nil {
			return nil, errors.New(clip(strings.TrimPrefix(err.Error(), "yaml: ")))
		}
		return s, nil
	}
	if plain := n.Style == 0; plain && n.Tag == "!!str" {
		if v, err := boolean(n.Value); err == nil {
			return v, nil
		}
	}
	return n.Value, nil
}

// boolean reads what YAML 1.1, and so Kubernetes, takes for true or false.
func boolean(s string) (any, error) {
	switch s {
	case "y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON":
		return true, nil
	case "n", "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF":
		return false, nil
	}
	return nil, fmt.Errorf("%q is neither true nor false", clip(s))
}
