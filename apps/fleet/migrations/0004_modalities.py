from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('fleet', '0003_manager'),
    ]

    operations = [
        migrations.AlterField(
            model_name='model',
            name='modality',
            field=models.CharField(choices=[('text', 'Text'), ('vision', 'Vision'), ('speech', 'Speech'), ('image', 'Image'), ('video', 'Video'), ('embedding', 'Embedding'), ('transcription', 'Transcription')], max_length=20),
        ),
    ]
