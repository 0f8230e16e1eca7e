package service

import (
	"fmt"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"

	"github.com/millrace/millrace/kernel/bpfmap"
)

// field is a number somewhere in a C type: "to.source.word[2]".
type field struct {
	name     string
	at, size int // in bytes
}

// fields are in the order in which they lie.
type fields []field

// layout is where what is in the entries of a map.
type layout struct{ key, value fields }

// layoutOf reads the layout of a map from its own description.
func layoutOf(m *ebpf.Map) (layout, error) {
	key, value, err := bpfmap.Types(m)
	if err != nil {
		return layout{}, err
	}
	return layout{fieldsOf(nil, "", 0, key), fieldsOf(nil, "", 0, value)}, nil
}

// layoutWanted is that of a map of this version.
func layoutWanted(spec *ebpf.MapSpec) layout {
	return layout{fieldsOf(nil, "", 0, spec.Key), fieldsOf(nil, "", 0, spec.Value)}
}

// fieldsOf adds the fields of a type that lies at an offset. Bit fields and
// unions are left out: there are none.
func fieldsOf(all fields, name string, at int, t btf.Type) fields {
	switch t := btf.UnderlyingType(t).(type) {
	case *btf.Int:
		return append(all, field{name, at, int(t.Size)})
	case *btf.Enum:
		return append(all, field{name, at, int(t.Size)})
	case *btf.Array:
		size, err := btf.Sizeof(t.Type)
		if err != nil {
			return all
		}
		for i := range int(t.Nelems) {
			all = fieldsOf(all, fmt.Sprintf("%s[%d]", name, i), at+i*size, t.Type)
		}
	case *btf.Struct:
		if t.Name == "bpf_spin_lock" {
			return all // the kernel's own
		}
		for _, m := range t.Members {
			inner := m.Name
			if name != "" {
				inner = name + "." + m.Name
			}
			all = fieldsOf(all, inner, at+int(m.Offset.Bytes()), m.Type)
		}
	}
	return all
}

// find returns the field of a name; size 0 if there is none.
func (f fields) find(name string) field {
	if i := slices.IndexFunc(f, func(one field) bool { return one.name == name }); i >= 0 {
		return f[i]
	}
	return field{}
}

// below are the fields inside a structure, with names that begin there.
func (f fields) below(name string) (inner fields) {
	for _, one := range f {
		if rest, ok := strings.CutPrefix(one.name, name+"."); ok {
			inner = append(inner, field{rest, one.at, one.size})
		}
	}
	return inner
}

// has says whether there is a field of that name, or a structure or array.
func (f fields) has(name string) bool {
	return slices.ContainsFunc(f, func(one field) bool {
		rest, ok := strings.CutPrefix(one.name, name)
		return ok && (rest == "" || rest[0] == '.' || rest[0] == '[')
	})
}

// step copies bytes from one layout to another.
type step struct{ from, to, size int }

// steps copy what has the same name in both, as little as possible at a time. A
// number that has another size is cut, or filled up with zeros: both ends are
// little-endian.
func steps(from, to fields) (all []step) {
	for _, t := range to {
		f := from.find(t.name)
		if f.size == 0 {
			continue
		}
		next := step{f.at, t.at, min(f.size, t.size)}
		if n := len(all); n > 0 && f.size == t.size && all[n-1].from+all[n-1].size == next.from && all[n-1].to+all[n-1].size == next.to {
			all[n-1].size += next.size
			continue
		}
		all = append(all, next)
	}
	return all
}

// carry copies one value.
func carry(steps []step, from, to []byte) {
	clear(to)
	for _, s := range steps {
		copy(to[s.to:s.to+s.size], from[s.from:])
	}
}

// needed are the fields without which the entries of a map mean nothing; others
// can be zero. The empty name is the whole.
var needed = map[string]struct{ key, value []string }{
	datapathMapServices:     {[]string{"address", "port", "protocol"}, []string{"id", "slots"}},
	datapathMapSlots:        {[]string{"service", "slot"}, []string{""}},
	datapathMapBackends:     {[]string{""}, []string{"address", "port", "service"}},
	datapathMapPaths:        {[]string{""}, []string{""}},
	datapathMapConnected:    {nil, []string{"service", "service_port", "backend", "backend_port"}},
	datapathMapSent:         {nil, []string{"next", "last", "flow[0].service", "flow[0].service_port", "flow[0].backend", "flow[0].backend_port", "flow[0].number"}},
	datapathMapTranslations: {tupleFields, []string{"to.source", "to.destination", "to.source_port", "to.destination_port", "to.protocol", "was", "service", "number", "seen", "flags", "role"}},
	datapathMapPlaces:       {[]string{""}, tupleFields},
	datapathMapFlowUsage:    {[]string{""}, []string{"flows"}},
	datapathMapDraining:     {[]string{"service", "endpoint", "service_port", "endpoint_port"}, []string{""}},
}

var tupleFields = []string{"source", "destination", "source_port", "destination_port", "protocol"}

// translator turns entries of one map into entries of another.
type translator struct {
	name       string
	from, to   layout
	key, value []step
}

// translatorTo makes the translator between an earlier process's map and one of
// this version; the error names what is missing.
func translatorTo(from *ebpf.Map, to *ebpf.MapSpec) (*translator, error) {
	theirs, err := layoutOf(from)
	if err != nil {
		return nil, err
	}
	return newTranslator(to.Name, theirs, layoutWanted(to))
}

// translatorBetween is translatorTo for two maps that are there.
func translatorBetween(name string, from, to *ebpf.Map) (*translator, error) {
	theirs, err := layoutOf(from)
	if err != nil {
		return nil, err
	}
	ours, err := layoutOf(to)
	if err != nil {
		return nil, err
	}
	return newTranslator(name, theirs, ours)
}

func newTranslator(name string, from, to layout) (*translator, error) {
	for _, field := range needed[name].key {
		if !from.key.has(field) || !to.key.has(field) {
			return nil, fmt.Errorf("the keys of its %s have no field %q", name, field)
		}
	}
	for _, field := range needed[name].value {
		if !from.value.has(field) || !to.value.has(field) {
			return nil, fmt.Errorf("its %s have no field %q", name, field)
		}
	}
	return &translator{name, from, to, steps(from.key, to.key), steps(from.value, to.value)}, nil
}
