package kubeproxy

import (
	"reflect"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/kube-proxy/config/v1alpha1"

	"github.com/millrace/millrace/test/docs"
)

// leaves are the paths of an API type, and of all that it holds.
func leaves(of reflect.Type, path string, found map[string]reflect.Type) {
	for of.Kind() == reflect.Pointer {
		of = of.Elem()
	}
	if path != "" {
		found[path] = of
	}
	if of.Kind() != reflect.Struct || of == reflect.TypeFor[metav1.Duration]() || of.Name() == "TimeOrMetaDuration" || of.Name() == "QuantityValue" {
		return
	}
	for i := range of.NumField() {
		field := of.Field(i)
		name, options, _ := strings.Cut(field.Tag.Get("json"), ",")
		below := strings.TrimPrefix(path+"."+name, ".")
		if field.Anonymous && (name == "" || options == "inline") {
			below = path
		}
		if field.Type != reflect.TypeFor[metav1.TypeMeta]() {
			leaves(field.Type, below, found)
		}
	}
}

// Every field of the API is in Fields, in the shape that it has there, and nothing
// is in Fields that the API does not have.
func TestNoFieldIsForgotten(t *testing.T) {
	api := map[string]reflect.Type{}
	leaves(reflect.TypeFor[v1alpha1.KubeProxyConfiguration](), "", api)
	if len(api) < 60 {
		t.Fatalf("only %d fields found: the test is blind", len(api))
	}
	listed := map[string]bool{}
	for i := range Fields {
		f := &Fields[i]
		of, known := api[f.Path]
		switch {
		case !known:
			t.Errorf("%s is not in the API", f.Path)
			continue
		case listed[f.Path]:
			t.Errorf("%s is in Fields twice", f.Path)
		case f.Text == "" || f.Fate == Honoured && f.set == nil:
			t.Errorf("%s: it is not said what becomes of it", f.Path)
		}
		listed[f.Path] = true
		if want := shapeOf(of); f.shape != anything && f.shape != want {
			t.Errorf("%s is read as shape %d, it is a %s", f.Path, f.shape, of)
		}
	}
	for path := range api {
		if !covered(path, listed) {
			t.Errorf("%s is a field of the API and not in Fields: add it and say what becomes of it", path)
		}
	}
}

// covered: the path, one above it, or what is below it is listed.
func covered(path string, listed map[string]bool) bool {
	for above := path; ; {
		if listed[above] {
			return true
		}
		i := strings.LastIndexByte(above, '.')
		if i < 0 {
			break
		}
		above = above[:i]
	}
	for one := range listed {
		if strings.HasPrefix(one, path+".") {
			return true
		}
	}
	return false
}

func shapeOf(of reflect.Type) shape {
	switch of.Kind() {
	case reflect.String:
		return text
	case reflect.Bool:
		return flag
	case reflect.Int32, reflect.Uint32, reflect.Float32:
		return number
	case reflect.Slice:
		return list
	case reflect.Struct:
		if of == reflect.TypeFor[metav1.Duration]() {
			return duration
		}
	}
	return anything
}

// The documentation has the table that the code goes by.
func TestTableInDocsIsFresh(t *testing.T) {
	docs.Fresh(t, "../../docs/kube-proxy.md", "fields", Table())
}
