package dir

import (
	"bytes"
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
	"unicode/utf8"

	kjson "sigs.k8s.io/json"

	"github.com/millrace/millrace/model"
	"github.com/millrace/millrace/source/cluster"
)

// contents are what a file says.
type contents struct {
	objects  []*cluster.Object
	byKey    map[cluster.Key]*cluster.Object
	problems []model.Problem
	ignored  map[string]int
	// unread counts the parts of the file that could not be read: where there are
	// any, an object which is not in objects may still be meant to exist.
	unread int
}

// decoder reads one file.
type decoder struct {
	file *cluster.File
	contents
	count int
	// budget is what values may still be written for the YAML document at hand,
	// aliased what aliases may still add in all documents, in bytes.
	budget  int
	aliased int
	// take is given every object of whatever kind, where the objects are not to be decoded.
	take func(*manifest)
}

// decode reads all documents in data, which came from file.
func decode(file string, data []byte) contents { return decodeFor(file, data, nil) }

// decodeFor gives the objects to take, unless that is nil.
func decodeFor(file string, data []byte, take func(*manifest)) contents {
	d := &decoder{file: cluster.NewFile(file), aliased: maxAliasedFile, take: take}
	d.byKey = map[cluster.Key]*cluster.Object{}
	data = bytes.TrimPrefix(data, []byte("\xef\xbb\xbf"))
	switch {
	case len(data) > MaxFile:
		d.fail(1, "", "", "the file is larger than %d MiB: split it", MaxFile>>20)
	case !utf8.Valid(data):
		d.fail(1, "", "", "the file is not UTF-8 text: save it as UTF-8, or give it another ending if it is no manifest")
	case strings.EqualFold(filepath.Ext(file), ".json"):
		d.json(data, 1)
	default:
		d.yaml(data)
	}
	if more := len(d.problems) - maxProblems; more > 0 {
		d.problems = append(d.problems[:maxProblems], model.Problem{Where: file, Text: fmt.Sprintf("%d more problems in this file are not listed: mend these first", more)})
	}
	return d.contents
}

// fail reports something that could not be read.
func (d *decoder) fail(line int, object, field, format string, args ...any) {
	d.unread++
	d.tell(line, object, field, fmt.Sprintf(format, args...))
}

func (d *decoder) tell(line int, object, field, text string) {
	d.problems = append(d.problems, model.Problem{Where: d.file.Where(line), Object: object, Field: field, Text: text})
}

// head is what every Kubernetes object starts with.
type head struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Metadata   struct {
		Namespace string `json:"namespace"`
		Name      string `json:"name"`
	} `json:"metadata"`
}

// object names the object as far as it can be read.
func (h *head) object() string {
	switch {
	case h.Kind == "":
		return strings.TrimPrefix(clip(h.Metadata.Name), " ")
	case h.Metadata.Name == "":
		return clip(h.Kind)
	}
	return clip(cluster.KeyOf(h.Kind, h.Metadata.Namespace, h.Metadata.Name).String())
}

// manifest is one object in a file.
type manifest struct {
	head
	json  []byte
	lines *lines
}

// unwanted says of a ConfigMap that it is none of those that are read.
func (m *manifest) unwanted() bool {
	return m.Kind == "ConfigMap" && !cluster.IsConfiguration(m.Metadata.Namespace, m.Metadata.Name)
}

// counted says whether the file may hold one more document or object.
func (d *decoder) counted(line int) bool {
	if d.count++; d.count == MaxObjects+1 {
		d.fail(line, "", "", "the file holds more than %d documents and objects: split it", MaxObjects)
	}
	return d.count <= MaxObjects
}

// object reads one object that is no list.
func (d *decoder) object(m *manifest) {
	line := m.lines.of("")
	k, known := kinds[m.Kind]
	switch {
	case m.Kind == "":
		d.fail(line, m.object(), "kind", "the document has no kind: add one, or move the file away if it is no manifest")
		return
	case m.APIVersion == "":
		d.fail(line, m.object(), "apiVersion", "the document has no apiVersion: add one (kubectl api-resources lists them)")
		return
	case d.take != nil:
		d.take(m)
		return
	case !known || m.APIVersion != k.apiVersion && !k.formerly(m.APIVersion) || m.unwanted():
		d.ignore(m.APIVersion, m.Kind, 1)
		return
	case m.APIVersion != k.apiVersion:
		d.fail(m.lines.of("apiVersion"), m.object(), "apiVersion", "%s is no longer served by Kubernetes: write %s", clip(m.APIVersion), k.apiVersion)
		return
	case len(m.json) > MaxObject || values(m.json) > maxObjectValues:
		d.fail(line, m.object(), "", "the object is larger than %d MiB or holds more than %d values: split it", MaxObject>>20, maxObjectValues)
		return
	}
	d.typed(m, k)
}

// typed decodes an object of a kind that is read.
func (d *decoder) typed(m *manifest, k kind) {
	obj := k.make()
	oddities, err := kjson.UnmarshalStrict(m.json, obj)
	if err != nil {
		field, err := blame(m.json, err, func(data []byte) error { return kjson.UnmarshalCaseSensitivePreserveInts(data, k.make()) })
		d.fail(m.lines.of(field), m.object(), field, "%s", plain(err))
		return
	}
	for _, odd := range oddities {
		field, text := oddity(odd, m.Kind)
		d.tell(m.lines.of(field), m.object(), field, text)
	}
	o, err := cluster.Read(cluster.Place{File: d.file, Line: m.lines.of}, obj)
	if err != nil {
		d.fail(m.lines.of(""), m.object(), "", "%v", err)
		return
	}
	if !o.Named() {
		d.problems = append(d.problems, o.Problems()...)
		d.unread++
		return
	}
	if first := d.byKey[o.Key()]; first != nil {
		d.tell(m.lines.of(""), o.Key().String(), "metadata.name", fmt.Sprintf("is at %s already, which stays in force: remove or rename one of them", first.Where()))
		return
	}
	d.byKey[o.Key()] = o
	d.objects = append(d.objects, o)
}

// ignore counts objects of a kind that is not read. A kind of another group that
// has the name of one that is read is told apart by its group.
func (d *decoder) ignore(apiVersion, kind string, n int) {
	if k, known := kinds[kind]; known && apiVersion != k.apiVersion {
		group, _, _ := strings.Cut(apiVersion, "/")
		kind += "." + group
	}
	if d.ignored == nil {
		d.ignored = map[string]int{}
	}
	d.ignored[clip(kind)] += n
}

var (
	wrongType = regexp.MustCompile(`cannot unmarshal (.+) into Go (?:struct field \S+|value) of type (\S+)$`)
	quoted    = regexp.MustCompile(`^(unknown|duplicate) field "(.*)"$`)
)

// plain says a decoding error in words of the manifest instead of Go's.
func plain(err error) string {
	text := strings.TrimPrefix(err.Error(), "json: ")
	m := wrongType.FindStringSubmatch(text)
	switch {
	case strings.HasPrefix(text, "quantities must match"):
		return "this is no quantity: write a number with a unit such as 64Mi or 250m"
	case m == nil:
		return clip(text)
	}
	want := "a mapping"
	switch goType := m[2]; {
	case strings.HasPrefix(goType, "[]"):
		want = "a list"
	case strings.HasPrefix(goType, "int"):
		want = "a whole number without quotes"
	case goType == "bool":
		want = "true or false without quotes"
	case goType == "string" || strings.HasSuffix(goType, "Protocol") || strings.HasSuffix(goType, "Type") || strings.HasSuffix(goType, "Policy"):
		want = "text (in quotes if it looks like a number or like yes and no)"
	}
	got := map[string]string{"array": "a list", "object": "a mapping", "string": "text", "bool": "true or false", "number": "a number"}[m[1]]
	if got == "" {
		got = m[1]
	}
	return fmt.Sprintf("this is %s: write %s", clip(got), want)
}

// oddity splits what strict decoding noticed into field and text.
func oddity(err error, kind string) (field, text string) {
	m := quoted.FindStringSubmatch(err.Error())
	switch {
	case m == nil:
		return "", clip(err.Error())
	case m[1] == "unknown":
		return m[2], "a " + kind + " has no such field, so it is passed over: check the spelling and the indentation"
	}
	return m[2], "the field is here twice and the last one counts: remove one"
}

// values is an upper bound of how many values JSON text holds.
func values(json []byte) int {
	return bytes.Count(json, []byte(",")) + bytes.Count(json, []byte("{")) + bytes.Count(json, []byte("["))
}

// clip shortens what was read so that a message stays one line.
func clip(s string) string {
	s, _, _ = strings.Cut(s, "\n")
	if len(s) > 200 {
		return strings.ToValidUTF8(s[:200], "") + "..."
	}
	return s
}
