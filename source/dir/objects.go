package dir

import (
	"maps"
	"slices"

	"github.com/millrace/millrace/model"
)

// Object is one object of any kind, as JSON.
type Object struct {
	APIVersion, Kind string
	JSON             []byte
}

// Objects reads once what the manifests at path say, objects of all kinds, also those
// that Read passes over. They come in the order of the files' names. What could not be
// read is among the problems; an error says that nothing could.
func Objects(path string) ([]Object, []model.Problem, error) {
	s, err := Open(path)
	if err != nil {
		return nil, nil, err
	}
	s.scan(nil)
	var all []Object
	var problems []model.Problem
	for _, name := range slices.Sorted(maps.Keys(s.files.byPath)) {
		data, _, err := read(name)
		if err != nil {
			problems = append(problems, model.Problem{Where: name, Text: cause(err).Error()})
			continue
		}
		found, faults := Decode(name, data)
		all, problems = append(all, found...), append(problems, faults...)
	}
	return all, problems, nil
}

// Decode reads the objects in a text of YAML or JSON. Where names it in problems; one
// that ends in .json is read as JSON.
func Decode(where string, text []byte) (all []Object, problems []model.Problem) {
	said := decodeFor(where, text, func(m *manifest) {
		all = append(all, Object{m.APIVersion, m.Kind, slices.Clone(m.json)})
	})
	return all, said.problems
}
