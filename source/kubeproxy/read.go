package kubeproxy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/millrace/millrace/model"
)

// The one kind that is read.
const (
	Kind       = "KubeProxyConfiguration"
	APIVersion = "kubeproxy.config.k8s.io/v1alpha1"
)

// most is how long a configuration may be: a ConfigMap holds no more.
const most = 1 << 20

// Read reads a configuration from YAML or JSON; where names it in messages. Of
// several documents it reads the one of the right kind: kubeadm keeps its own
// configuration in the same file. What is wrong with single fields is in Problems;
// an error means that there is no configuration.
func Read(where string, data []byte) (Settings, error) {
	if len(data) > most {
		return Settings{}, fmt.Errorf("read %s: it has %d bytes, a configuration has at most %d: is this the right file?", where, len(data), most)
	}
	document, err := find(data)
	if err != nil {
		return Settings{}, fmt.Errorf("read %s: %w", where, err)
	}
	r := reader{where: where, settings: Settings{Conntrack: usualConntrack}}
	r.mapping("", document)
	r.settings.complete()
	return r.settings, nil
}

// find is the configuration among the documents.
func find(data []byte) (*yaml.Node, error) {
	var others []string
	for decoder := yaml.NewDecoder(bytes.NewReader(data)); ; {
		var document yaml.Node
		if err := decoder.Decode(&document); errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("there is no document of kind %s in it, only [%s]", Kind, strings.Join(others, ", "))
		} else if err != nil {
			return nil, fmt.Errorf("%s: correct it there", strings.TrimPrefix(err.Error(), "yaml: "))
		}
		kind, version := scalar(document.Content[0], "kind"), scalar(document.Content[0], "apiVersion")
		switch {
		case kind != Kind:
			others = append(others, clip(kind))
		case version != APIVersion:
			return nil, fmt.Errorf("its apiVersion is %q: write %s", clip(version), APIVersion)
		default:
			return document.Content[0], nil
		}
	}
}

// scalar is the text of a field of a mapping, "" where there is none.
func scalar(node *yaml.Node, name string) string {
	for i := 0; node.Kind == yaml.MappingNode && i+1 < len(node.Content); i += 2 {
		if node.Content[i].Value == name {
			return node.Content[i+1].Value
		}
	}
	return ""
}

// reader collects what the fields say.
type reader struct {
	where    string
	settings Settings
}

func (r *reader) problem(at *yaml.Node, path, format string, args ...any) {
	r.settings.Problems = append(r.settings.Problems, model.Problem{
		Where: r.where + ":" + strconv.Itoa(at.Line), Object: Kind, Field: path, Text: fmt.Sprintf(format, args...),
	})
}

// mapping reads the fields below a path that ends in a dot or is empty.
func (r *reader) mapping(below string, node *yaml.Node) {
	node = behind(node)
	if node.Kind != yaml.MappingNode {
		if !null(node) {
			r.problem(node, strings.TrimSuffix(below, "."), "write fields below it, each with its name; this is passed over")
		}
		return
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(node.Content); i += 2 {
		name, one := node.Content[i], node.Content[i+1]
		path := below + name.Value
		if seen[path] {
			r.problem(name, clip(path), "the field is here twice and the first one counts: remove one")
			continue
		}
		seen[path] = true
		r.field(path, name, one)
	}
}

func (r *reader) field(path string, name, node *yaml.Node) {
	switch path {
	case "apiVersion", "kind", "metadata":
		return
	}
	for i := range Fields {
		if f := &Fields[i]; f.Path == path {
			r.take(f, behind(node))
			return
		}
	}
	for i := range Fields {
		if strings.HasPrefix(Fields[i].Path, path+".") {
			r.mapping(path+".", node)
			return
		}
	}
	r.problem(name, clip(path), "a %s has no such field, so it is passed over: check the spelling and the indentation", Kind)
}

// take reads the value of a field.
func (r *reader) take(f *Field, node *yaml.Node) {
	if null(node) {
		return
	}
	v, err := f.shape.read(node)
	if err == nil && f.set != nil && v.String() != "" {
		err = f.set(&r.settings, v)
	}
	if err != nil {
		r.problem(node, f.Path, "%v", err)
		return
	}
	if note := f.note(v); note != "" {
		r.settings.Notes = append(r.settings.Notes, note)
	}
}

// read checks that a value has the shape.
func (s shape) read(node *yaml.Node) (value, error) {
	one := node.Kind == yaml.ScalarNode
	switch s {
	case text:
		if !one || node.ShortTag() != "!!str" {
			return value{}, fmt.Errorf("write text, in quotes if it looks like something else")
		}
	case flag:
		if !one || node.ShortTag() != "!!bool" {
			return value{}, fmt.Errorf("write true or false without quotes")
		}
		return value{text: strings.ToLower(node.Value)}, nil
	case number:
		if !one || node.ShortTag() != "!!int" && node.ShortTag() != "!!float" {
			return value{}, fmt.Errorf("write a number without quotes")
		}
	case duration:
		if _, err := time.ParseDuration(node.Value); !one || node.ShortTag() != "!!str" || err != nil {
			return value{}, fmt.Errorf("%s is no time: write one with its unit, such as 30s or 1h", clip(strconv.Quote(node.Value)))
		}
	case list:
		v := value{list: []string{}}
		if err := node.Decode(&v.list); err != nil || node.Kind != yaml.SequenceNode {
			return value{}, fmt.Errorf("write a list")
		}
		return v, nil
	case anything:
		return whole(node)
	}
	return value{text: node.Value}, nil
}

// whole is a structure as JSON with sorted keys; one that is empty is "".
func whole(node *yaml.Node) (value, error) {
	if node.Kind == yaml.ScalarNode {
		return value{text: node.Value}, nil
	}
	var content any
	if err := node.Decode(&content); err != nil {
		return value{}, errors.New("it cannot be read: " + clip(err.Error()))
	}
	data, err := json.Marshal(content)
	if err != nil {
		return value{}, errors.New("its keys are no text")
	}
	if text := string(data); text != "{}" && text != "[]" {
		return value{text: text}, nil
	}
	return value{}, nil
}

// behind is what an alias stands for.
func behind(node *yaml.Node) *yaml.Node {
	if node.Kind == yaml.AliasNode {
		return node.Alias
	}
	return node
}

func null(node *yaml.Node) bool { return node.Kind == yaml.ScalarNode && node.ShortTag() == "!!null" }

func sameTime(a, b string) bool {
	one, errOne := time.ParseDuration(a)
	other, errOther := time.ParseDuration(b)
	return errOne == nil && errOther == nil && one == other
}

// clip shortens what was read so that a message stays one line.
func clip(s string) string {
	s, _, cut := strings.Cut(s, "\n")
	if len(s) > 100 {
		s, cut = strings.ToValidUTF8(s[:100], ""), true
	}
	if cut {
		s += "..."
	}
	return s
}
