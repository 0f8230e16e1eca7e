package dir

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	kjson "sigs.k8s.io/json"
)

// json reads a stream of JSON documents that starts at a line of the file. A
// single one, as most files are, is read where it is; the Decoder would hold it
// three times.
func (d *decoder) json(data []byte, line int) {
	if json.Valid(data) {
		document := bytes.TrimLeft(data, space)
		line += bytes.Count(data[:len(data)-len(document)], newline)
		d.jsonDocument(bytes.TrimRight(document, space), line)
		return
	}
	in := json.NewDecoder(bytes.NewReader(data))
	for at := 0; ; {
		var raw json.RawMessage
		err := in.Decode(&raw)
		if err == io.EOF {
			return
		}
		if err != nil {
			d.badJSON(data[at:], line, err, int(in.InputOffset())-at)
			return
		}
		start := int(in.InputOffset()) - len(raw)
		line += bytes.Count(data[at:start], newline)
		d.jsonDocument(raw, line)
		line += bytes.Count(raw, newline)
		at = start + len(raw)
	}
}

var newline = []byte("\n")

// space is what JSON takes for white space (RFC 8259, section 2).
const space = " \t\r\n"

// badJSON reports JSON that is none. Where one document ends and the next begins
// is lost with it, so that the rest of the file cannot be read.
func (d *decoder) badJSON(rest []byte, line int, err error, consumed int) {
	at := consumed
	if syntax := new(json.SyntaxError); errors.As(err, &syntax) {
		// Unmarshal counts from the start of the document, unlike the Decoder.
		if again := json.Unmarshal(rest, new(json.RawMessage)); errors.As(again, &syntax) {
			at = int(syntax.Offset) - 1
		}
	}
	at = min(max(at, 0), len(rest))
	h := jsonHead(rest)
	d.fail(line+bytes.Count(rest[:at], newline), h.object(), "", "%s; nothing after it can be read: mend the JSON", clip(err.Error()))
}

// jsonHead reads the head of a broken document as far as it goes.
func jsonHead(data []byte) head {
	var h head
	in := json.NewDecoder(bytes.NewReader(data))
	if open, err := in.Token(); err != nil || open != json.Delim('{') {
		return h
	}
	for in.More() {
		key, err := in.Token()
		if err != nil {
			return h
		}
		into := map[json.Token]any{"kind": &h.Kind, "apiVersion": &h.APIVersion, "metadata": &h.Metadata}[key]
		if into == nil {
			into = new(json.RawMessage)
		}
		if in.Decode(into) != nil {
			return h
		}
	}
	return h
}

// jsonDocument reads an object or a list.
func (d *decoder) jsonDocument(raw []byte, line int) {
	m := &manifest{json: raw, lines: &lines{first: line, json: raw}}
	if raw[0] != '{' {
		d.fail(line, "", "", "this is no Kubernetes object: it has to start with {")
		return
	}
	if !d.headed(m) {
		return
	}
	item, isList := listOf(m.head)
	if !isList {
		if d.counted(line) {
			d.object(m)
		}
		return
	}
	d.jsonItems(raw, line, item)
}

// jsonItems reads the items of a list. The text is JSON already, so that no
// error of syntax can come up here.
func (d *decoder) jsonItems(list []byte, line int, item head) {
	in := json.NewDecoder(bytes.NewReader(list))
	in.Token()
	for in.More() {
		key, _ := in.Token()
		if key != "items" {
			var skip json.RawMessage
			in.Decode(&skip)
			continue
		}
		open, _ := in.Token()
		if open == nil {
			continue // null is an empty list
		}
		if open != json.Delim('[') {
			d.fail(line, item.Kind+"List", "items", "items is no list: write a list of objects")
			return
		}
		var raw json.RawMessage // the same memory for all: nothing of it is kept
		for at := 0; in.More(); {
			in.Decode(&raw)
			start := int(in.InputOffset()) - len(raw)
			line += bytes.Count(list[at:start], newline)
			at = start
			if !d.counted(line) {
				return
			}
			d.jsonItem(raw, line, item)
		}
		in.Token()
	}
}

// jsonItem reads an item, which has its kind from the list unless it says one.
func (d *decoder) jsonItem(raw []byte, line int, item head) {
	m := &manifest{json: raw, lines: &lines{first: line, json: raw}}
	if raw[0] != '{' {
		d.fail(line, "", "", "the item is no Kubernetes object: write a mapping with kind and apiVersion")
		return
	}
	if d.headed(m) {
		d.item(m, item)
	}
}

// headed reads the head of a manifest and says whether it has a readable one.
func (d *decoder) headed(m *manifest) bool {
	decode := func(data []byte, into *head) error { return kjson.UnmarshalCaseSensitivePreserveInts(data, into) }
	err := decode(m.json, &m.head)
	if err != nil {
		m.head = jsonHead(m.json)
		field, err := blame(m.json, err, func(data []byte) error { return decode(data, new(head)) })
		d.fail(m.lines.of(field), m.object(), field, "%s", plain(err))
	}
	return err == nil
}

// item reads one item of a list. Lists in lists are not read.
func (d *decoder) item(m *manifest, from head) {
	if m.Kind == "" && m.APIVersion == "" {
		m.Kind, m.APIVersion = from.Kind, from.APIVersion
	}
	if _, isList := listOf(m.head); isList {
		d.fail(m.lines.of(""), m.object(), "kind", "a list inside a list is not read: put its items into the outer one")
		return
	}
	d.object(m)
}

// listOf says whether an object is a list, and what a typed one's items are.
func listOf(h head) (item head, isList bool) {
	if h.Kind == "List" && h.APIVersion == "v1" {
		return head{}, true
	}
	kind, isList := strings.CutSuffix(h.Kind, "List")
	if _, known := kinds[kind]; !isList || !known {
		return head{}, false
	}
	return head{Kind: kind, APIVersion: h.APIVersion}, true
}

// blame finds the innermost field that alone makes decode fail, and how it does.
// That is the whole object, "", and err, where looking would take too long.
func blame(object []byte, err error, decode func([]byte) error) (string, error) {
	var tree any
	if len(object) > maxBlame || kjson.UnmarshalCaseSensitivePreserveInts(object, &tree) != nil {
		return "", err
	}
	path, inside := "", func(v any) any { return v }
	for {
		child, found := faulty(tree, func(v any) bool {
			data, bad := json.Marshal(inside(v))
			if bad == nil {
				bad = decode(data)
			}
			if bad != nil {
				err = bad
			}
			return bad != nil
		})
		if !found {
			return strings.TrimPrefix(path, "."), err
		}
		outer := inside
		tree, path, inside = child.value, path+child.name, func(v any) any { return outer(child.alone(v)) }
	}
}

// part is a field of a mapping or an element of a list.
type part struct {
	name  string
	value any
	// alone makes a mapping or list that holds nothing but a value in this place.
	alone func(any) any
}

// faulty is the first part of v that fails without the others.
func faulty(v any, fails func(any) bool) (part, bool) {
	var parts []part
	switch v := v.(type) {
	case map[string]any:
		for key, value := range v {
			parts = append(parts, part{"." + key, value, func(v any) any { return map[string]any{key: v} }})
		}
		slices.SortFunc(parts, func(a, b part) int { return strings.Compare(a.name, b.name) })
	case []any:
		for i, value := range v {
			parts = append(parts, part{fmt.Sprintf("[%d]", i), value, func(v any) any { return []any{v} }})
		}
	}
	for _, p := range parts {
		if fails(p.alone(p.value)) {
			return p, true
		}
	}
	return part{}, false
}
